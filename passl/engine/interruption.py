"""Being told to stop: SIGTERM (a scheduler, the launcher) and SIGINT (Ctrl-C) end a run after the step in hand."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Optional

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The run was told to stop, and has saved what it did."""

    def __init__(self, step: int, checkpoint: Optional[Path]) -> None:
        super().__init__(
            f"told to stop after step {step}; everything is saved in {checkpoint}. Go on with -o Global.checkpoint=auto"
        )


class StopSignals:
    """Within this context the two signals are noted, and no longer end the process.

    A launcher sends SIGTERM several times, so a second one changes nothing; a second Ctrl-C does not wait.

    Attributes:
        received: the first one that came.
    """

    def __init__(self) -> None:
        self.received: Optional[signal.Signals] = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Elsewhere Python has no handlers to set: whoever trains in a thread ends that thread by other means.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self._before.items():
            # None: it was not set by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
