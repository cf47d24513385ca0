"""One run in one folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
from pathlib import Path
from types import TracebackType
from typing import Optional

logger = logging.getLogger("passl")

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUseError(RuntimeError):
    """Another process writes to the folder; the text names it."""


class FolderLock:
    """Held while a run writes to ``folder``: ``{folder}.lock`` beside it, gone at the end.

    A record lock: the system gives it up however its process ends, worker processes do not inherit it, and it holds
    on network file systems.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder, or the one that holds it, cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.with_name(f"{folder.name}.lock")
        self._file: Optional[int] = None
        self._made: list[Path] = []

    def __enter__(self) -> FolderLock:
        self._made = [place for place in self.folder.parents if not place.exists()]
        _check_writable(self.folder)
        while self._file is None:
            self._file = self._locked()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        # While it is still held: who waits for this file sees that it is no longer the one of that name.
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        for place in self._made:
            with contextlib.suppress(OSError):  # something is in it
                place.rmdir()

    def _locked(self) -> Optional[int]:
        """The open and locked file; None if its name was given to another one meanwhile."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if error.errno in _UNSUPPORTED:
                logger.warning("%s: this file system has no locks: take care that no other run writes there", self.path)
                return os.open(self.path, os.O_RDWR)
            raise FolderInUseError(
                f"another run{f' ({holder})' if holder else ''} writes to {self.folder}: wait for its end, or give "
                "this one a folder of its own with -o Global.name=NAME or -o Global.output_dir=FOLDER"
            ) from None
        try:
            is_the_one = os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            is_the_one = False
        if not is_the_one:
            os.close(file)
            return None
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
        return file


def _check_writable(folder: Path) -> None:
    """Before the first step, not at the first checkpoint."""
    place = folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        for place in (folder.parent, folder):
            if place.exists():
                probe = place / f".{os.getpid()}.partial"
                probe.write_bytes(b"")
                probe.unlink()
    except OSError as error:
        raise type(error)(
            error.errno, f"results cannot be written there ({error.strerror}); set Global.output_dir", str(place)
        ) from error
