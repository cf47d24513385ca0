"""What a file of weights may cost: the one error of the readers, and the budget of the memory they take."""

from __future__ import annotations

import contextlib
import struct
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What parsing raises when the bytes break a rule of their format.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,  # of an array's header, by numpy
)
_FREE_BYTES = 64 << 20
_BYTES_PER_FILE_BYTE = 4


class CheckpointFormatError(ValueError):
    """A file of weights that is damaged, hostile, or of another kind; the text says which file and what is wrong."""


class RefusedGlobalError(CheckpointFormatError):
    """A file that asks for what is no part of a file of weights."""


class Budget:
    """Bytes that reading one file may allocate besides mapping it: 64 MiB and four times the size of the file.

    bfloat16 takes twice its size as float32 and a transposed view once; more than that is what a few bytes that
    claim to be a huge tensor (an expanded one, or thousands of views of one storage) would take.
    """

    def __init__(self, file_size: int) -> None:
        self._total = self._left = _FREE_BYTES + _BYTES_PER_FILE_BYTE * file_size

    def spend(self, size: int) -> None:
        """Take ``size`` bytes.

        Raises:
            CheckpointFormatError: that many are not left.
        """
        if size > self._left:
            raise CheckpointFormatError(
                f"its content needs {self._total - self._left + size} bytes of memory, more than the "
                f"{self._total} that are plausible for its size: refused"
            )
        self._left -= size


def shown(value: Any) -> str:
    """A value from a file for an error's text: short, and made in no time, which ``repr`` of a nested one is not."""
    if isinstance(value, (str, bytes)):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if type(value) in (int, float, bool, type(None)):
        return repr(value)[:40]
    if type(value) in (tuple, list) and len(value) <= 8 and not any(type(item) in (tuple, list) for item in value):
        return f"({', '.join(map(shown, value))})"
    return f"a {type(value).__name__}"


@contextlib.contextmanager
def blaming(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong inside is an error of the file at ``path``, which should be a ``kind``.

    Raises:
        CheckpointFormatError: the text starts with the path.
    """
    try:
        yield
    except CheckpointFormatError as error:
        raise type(error)(f"{path}: {error}") from None
    except DAMAGE as error:
        problem = f"{type(error).__name__}: {error!s:.200}"
        raise CheckpointFormatError(f"{path}: damaged, or not {kind} ({problem})") from error
