"""What a run writes about itself: console and file log, ``metrics.jsonl``, averages."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

logger = logging.getLogger("passl")


def harmless(text: str) -> str:
    """``text`` with escapes for what could steer a terminal: names of files may hold such characters."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class _ConsoleHandler(logging.Handler):
    """Writes through tqdm, so that a log line does not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """Says once that the disk is full, instead of a traceback for each line."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (a name of logging's)
        if not self._has_failed:
            self._has_failed = True
            print(f"error: {self.baseFilename}: cannot be written ({sys.exc_info()[1]})", file=sys.stderr)


def setup(file: Optional[Path] = None, quiet: bool = False) -> None:
    """Send the log to stderr, and to ``file`` as well; ``quiet`` (every process but the first) keeps only errors."""
    formatter = _Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%Y/%m/%d %H:%M:%S")
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_FileHandler(file, encoding="utf-8"))
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.propagate = False


class Average:
    """Mean of the finite and non-finite values given to it, weighted by ``count``."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, value: float, count: int = 1) -> None:
        self.total += value * count
        self.count += count

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with the ``step`` (optimizer steps done) it was measured at.

    Opened for a run that goes on at ``step``, it drops what a killed process wrote after that step, so no step is
    listed twice.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if step and row["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        partial.replace(path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        line = _line({"step": step, **values}).encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):  # a full disk; half a line would spoil the next one
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without a last line that a killed process left half written."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def duration(seconds: float) -> str:
    """``seconds`` as days, hours, minutes, seconds: ``1 day, 2:03:04`` or ``0:05:09``."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} day{'s' if days > 1 else ''}, {clock}" if days else clock
