"""Files that are written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` once it is on the disk.

    After an error ``path`` is as it was before, and nothing else is left. What is at ``path`` may be mapped and read
    meanwhile: it is replaced, not overwritten.

    Raises:
        OSError: the disk is full, or the folder missing or read-only; the text names ``path``.
    """
    # Processes of several machines, which share a folder, may have the same number.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot be written ({error.strerror})", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
