"""Where images go: a folder for each class, or a tarball."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Union

LINKS: dict[str, Callable[[Path, Path], object]] = {
    "copy": shutil.copyfile,
    "hard": os.link,
    "symbolic": lambda source, target: os.symlink(source.resolve(), target),
}
Content = Union[bytes, Path]


class FolderSink:
    """`root/<class>/<name>`."""

    def __init__(self, root: Path, link: str) -> None:
        self._root, self._link = root, LINKS[link]
        self._made: set[str] = set()

    def start(self, position: int) -> None:
        """Begin, or go on; files are replaced where a unit is written again."""
        self._root.mkdir(parents=True, exist_ok=True)

    def write(self, class_name: str, name: str, content: Content) -> None:
        """Add one image."""
        folder = self._root / class_name
        if class_name not in self._made:
            folder.mkdir(exist_ok=True)
            self._made.add(class_name)
        path = folder / name
        # Never into what is there: it may be a link to a file of the user's.
        if os.path.lexists(path):
            path.unlink()
        if isinstance(content, Path):
            self._put(content, path)
        else:
            path.write_bytes(content)

    def _put(self, source: Path, path: Path) -> None:
        try:
            self._link(source, path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            advice = "hard links need the same disk: --link symbolic, or copy"
            raise OSError(error.errno, advice, str(source), None, str(path)) from None

    def position(self) -> int:
        """All is on the disk; where the next run can go on is not needed for files."""
        os.sync()
        return 0

    def finish(self) -> None:
        """Nothing is left to write."""

    def close(self) -> None:
        """Nothing is open."""


class TarSink:
    """A tarball of `<class>/<name>`, in the order of writing; owner and times are left out, so that the same images
    give the same file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, position: int) -> None:
        """Begin, or go on behind the first `position` bytes."""
        self._file = self._path.open("r+b" if position else "wb")
        self._file.truncate(position)
        self._file.seek(position)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def write(self, class_name: str, name: str, content: Content) -> None:
        """Add one image."""
        data = content.read_bytes() if isinstance(content, Path) else content
        member = tarfile.TarInfo(f"{class_name}/{name}")
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # of millions, it would keep all in memory

    def position(self) -> int:
        """Bytes that are on the disk: where the next run can go on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def finish(self) -> None:
        """Write the end of the archive."""
        self._tar.close()
        self.position()

    def close(self) -> None:
        """Close the file, whole or not."""
        self._file.close()
