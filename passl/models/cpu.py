"""Settings of the process that make Paddle fast on a CPU."""

from __future__ import annotations

import ctypes

import paddle

# Parameters of mallopt(3) of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def tune() -> None:
    """Call once before training on a CPU: a step takes half the time. No effect on any number.

    Paddle takes the memory of each result from the C library and gives it back. A large block then comes as fresh
    pages from the kernel every time, whose page faults cost more than the arithmetic. Kept memory is used again. Where
    there is no mallopt (macOS, musl) only the flag is set.
    """
    # Copies after a transposition or a slice are very slow with strided kernels. Views no longer write through.
    paddle.set_flags({"FLAGS_use_stride_kernel": False})
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
