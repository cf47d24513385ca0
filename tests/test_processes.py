"""Processes that end with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine import tiny

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of Linux")
CHILD = """
import os, signal, time
from passl.processes import end_with
print(os.getpid(), end_with({parent}, signal.SIGKILL), flush=True)
time.sleep(60)
"""
PARENT = "import subprocess, sys, os; subprocess.run([sys.executable, '-c', sys.argv[1].format(parent=os.getpid())])"


@pytest.mark.smoke
def test_a_killed_parent_takes_its_child_along():
    command = [sys.executable, "-c", PARENT, CHILD]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tiny.process_environment())
    child, is_there = parent.stdout.readline().split()
    assert is_there == "True"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}/cmdline") and Path(f"/proc/{child}/cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_parent_that_is_gone_is_noticed():
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(parent=1).replace("60", "0")], capture_output=True, text=True,
        env=tiny.process_environment(), check=True,
    )  # fmt: skip
    assert done.stdout.split()[1] == "False"
