"""What the console commands share: parsers, exit codes, errors, and a quiet import of Paddle."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import passl
from passl.processes import end_with

CONFIG_ERROR, RUN_ERROR = 2, 1
INTERRUPTED = 75  # told to stop, and saved: the same command with Global.checkpoint=auto goes on (EX_TEMPFAIL)


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"passl {passl.__version__}")
    return parser


def whole_number(least: int = 1) -> Callable[[str], int]:
    """The type of options that take a whole number from ``least``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least}")
        return int(text)

    return number


def image_size(text: str) -> tuple[int, int]:
    """The type of --image-size."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} must be a side such as 224, heightxwidth such as 480x640")
    return int(sides[0]), int(sides[-1])


def guarded(function: object, *arguments: object) -> None:
    """Run to the end; an error of the user's gets its message alone, any other its traceback."""
    from passl.checkpoint import CheckpointError
    from passl.config import ConfigError
    from passl.data.loader import BadSamplesError
    from passl.data.workers import WorkerDiedError
    from passl.engine.folder_lock import FolderInUseError
    from passl.engine.interruption import Interrupted
    from passl.engine.non_finite import NonFiniteLossError
    from passl.evaluators.evaluator import EvaluationError
    from passl.exported import ExportError

    of_the_user = (
        CheckpointError, BadSamplesError, EvaluationError, ExportError, FolderInUseError, NonFiniteLossError,
        WorkerDiedError, OSError,
    )  # fmt: skip

    try:
        try:
            function(*arguments)
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BaseException:
            _outlive_this_process()
            raise
    except ConfigError as error:
        stop(error, CONFIG_ERROR)
    except of_the_user as error:
        stop(error, RUN_ERROR)


def _outlive_this_process() -> None:
    """Keep the connections of a failing process open for some seconds after its end, in an idle child.

    Otherwise the first process fails a moment later, of the broken connection, and the launcher, which looks once a
    second, shows that failure instead of this one.
    """
    if int(os.environ.get("PADDLE_TRAINER_ID") or 0) > 0 and hasattr(os, "fork") and os.fork() == 0:
        time.sleep(8)
        os._exit(0)


def end_with_the_launcher() -> None:
    """Have the system send SIGTERM to this process when the launcher that started it is killed.

    A launcher that is told to end tells its processes; one that is killed would leave them training.
    """
    launcher = os.getppid()
    with contextlib.suppress(OSError):  # the parent is gone, or hidden
        command = Path(f"/proc/{launcher}/cmdline").read_bytes()
        is_launcher = b"paddle.distributed.launch" in command or b"paddle/distributed/launch" in command
        if is_launcher and not end_with(launcher, signal.SIGTERM):
            sys.exit(RUN_ERROR)


def stop(error: Exception, code: int) -> None:
    from passl.log import harmless

    print(f"error: {harmless(str(error))}", file=sys.stderr)
    sys.exit(code)


def import_paddle() -> None:
    """Import Paddle on all cores of this process's share, without the warnings it prints about that and about
    ccache.
    """
    # Paddle takes one thread unless told otherwise. Processes on one machine share its cores.
    processes = int(os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("PADDLE_TRAINERS_NUM") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // max(processes, 1), 1)))
    warnings.filterwarnings("ignore", message=".*ccache.*")
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            import paddle  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "paddle":
                raise
            problem = 'PaddlePaddle is not installed: pip install "passl[cpu]", or "passl[gpu]" for CUDA'
            raise SystemExit(f"error: {problem}") from None
    for line in printed.getvalue().splitlines():
        if "OMP_NUM_THREADS" not in line:
            print(line, file=sys.stderr)
