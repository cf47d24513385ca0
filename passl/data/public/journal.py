"""What has been written of a split, in a file that outlives an interruption."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional


class Journal:
    """Lines of JSON: what the split is made of, then each finished unit, then what it holds when it is complete.

    Attributes:
        start: the first line, None where there is none yet.
        units: the finished ones, by name.
        end: the last line of a complete split.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read()

    def read(self) -> None:
        """What is in the file; a last line that was not finished does not count."""
        self.start: Optional[dict[str, Any]] = None
        self.units: dict[str, dict[str, Any]] = {}
        self.end: Optional[dict[str, Any]] = None
        self._size = 0  # bytes of whole lines
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else ():
            entry = _entry(line)
            if entry is None:
                break
            self._take(entry)
            self._size += len(line)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process writes this split meanwhile.

        Raises:
            BlockingIOError: one does.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = f"another process is writing {self.path.with_suffix('')}: wait for its end"
                raise BlockingIOError(error.errno, text) from None
            self.read()
            os.truncate(self.path, self._size)
            yield

    def begin(self, start: dict[str, Any]) -> None:
        """Forget everything, and note what the split is made of."""
        os.truncate(self.path, 0)
        self.read()
        self.add(start)

    def add(self, entry: dict[str, Any]) -> None:
        """One more line, on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "unit" in entry:
            self.units[entry["unit"]] = entry
        elif "complete" in entry:
            self.end = entry["complete"]
        elif "settings" in entry:
            self.start = entry


def _entry(line: bytes) -> Optional[dict[str, Any]]:
    """What a line says; None if it is not whole."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
