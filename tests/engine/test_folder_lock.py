"""One run in one folder at a time, and folders that cannot be written to."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from passl.engine.folder_lock import FolderLock
from tests.engine import tiny

HOLD = """
import sys, time
from pathlib import Path
from passl.engine.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    return tmp_path


@pytest.fixture
def holder(folder):
    """Another process that writes to out/DINO."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / "out/DINO")], stdout=subprocess.PIPE, env=tiny.process_environment()
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.smoke
def test_the_second_run_in_a_folder_refuses(folder, holder):
    started = time.monotonic()
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", "-o", "Global.checkpoint=auto")
    assert done.returncode == 1, done.stderr
    assert f"another run (process {holder.pid} on " in done.stderr
    assert f"writes to {folder / 'out/DINO'}" in done.stderr
    assert "-o Global.name=NAME" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
    assert not (folder / "out/DINO/train.log").exists(), "the first one's files are untouched"


def test_a_killed_run_holds_nothing(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with FolderLock(folder / "out/DINO"):
        assert (folder / "out/DINO.lock").read_text().startswith(f"process {os.getpid()} ")
    assert not (folder / "out/DINO.lock").exists()


def test_nothing_is_left_of_folders_made_for_the_lock(tmp_path):
    with FolderLock(tmp_path / "a/b/run"):
        assert (tmp_path / "a/b/run.lock").exists()
    assert not (tmp_path / "a").exists()
    with FolderLock(tmp_path / "a/b/run"):
        (tmp_path / "a/b/run").mkdir()
    assert list((tmp_path / "a/b").iterdir()) == [tmp_path / "a/b/run"]


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(folder):
    (folder / "file").write_text("")
    done = tiny.run(
        tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(Global__output_dir=folder / "file/runs")
    )
    assert done.returncode == 1
    assert "results cannot be written there (Not a directory); set Global.output_dir" in done.stderr
    assert "[Iter: 0/" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_read_only_folder(folder):
    (folder / "out").mkdir()
    (folder / "out").chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml")
    assert done.returncode == 1
    assert "results cannot be written there (Permission denied)" in done.stderr
