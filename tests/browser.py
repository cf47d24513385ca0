"""Pages in a real browser: Chromium without a window, where the system has one."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--virtual-time-budget=5000",
)  # fmt: skip
_SECONDS = 120


def find_browser() -> Optional[str]:
    return next(filter(None, map(shutil.which, _NAMES)), None)


needs_browser = pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(_NAMES)} on PATH")


def page_dom(path: Path) -> str:
    """The page at ``path`` as it is after its scripts ran, as HTML."""
    return _run(path, "--dump-dom")


def screenshot(path: Path, png: Path, width: int = 1280, height: int = 900) -> None:
    """A picture of the page at ``path``, width x height pixels, to ``png``."""
    _run(path, f"--screenshot={png.resolve()}", f"--window-size={width},{height}")
    if not png.is_file():
        pytest.fail(f"the browser made no picture of {path}")


def _run(path: Path, *arguments: str) -> str:
    browser = find_browser()
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} on PATH")
    profile = tempfile.mkdtemp()
    try:
        command = [browser, *_FLAGS, f"--user-data-dir={profile}", *arguments, path.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    finally:
        # Its last processes may still write there for a moment.
        shutil.rmtree(profile, ignore_errors=True)
    if done.returncode:
        pytest.fail(f"the browser ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout
