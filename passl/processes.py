"""What processes owe to those that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: signal.Signals) -> bool:
    """Have the system send the signal to this process when ``parent``, which started it, ends in whatever way.

    Returns:
        Whether ``parent`` is there still; if not, the signal does not come. True where there is no such service: Linux
        has it.
    """
    if not sys.platform.startswith("linux"):
        return True
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent
