"""Tar archives of other people, also inside others: nothing is unpacked, and every member is looked at."""

from __future__ import annotations

import contextlib
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from passl.data.tar_members import DIRECTORY, FILE, Member, PositionalFile, TarError, TarWalk, printable

_CHUNK = 1 << 20


class Archive:
    """An uncompressed tar archive, or with `part` a member of one that is an archive itself.

    Attributes:
        where: what to call it in messages.
    """

    def __init__(self, path: Path, part: Optional[Member] = None) -> None:
        self.where = f"{path}: {printable(part.path)}" if part else str(path)
        self._path, self._part = path, part
        self._bytes = _Part(path, part) if part else PositionalFile(path)

    def members(self) -> Iterator[Member]:
        """The files in their order. Folders and hidden files (macOS adds `._name`) are left out.

        Raises:
            TarError: the archive is cut off, damaged, compressed or none, or a member is no plain file.
        """
        walk = TarWalk(self._path)
        if isinstance(self._bytes, _Part):
            walk = _PartWalk(self._path, self._bytes, self.where)
        for member in walk:
            hidden = member.path.rpartition("/")[2].startswith(".") and ".." not in member.path.split("/")
            if member.kind == DIRECTORY or hidden:
                continue
            if member.kind != FILE:
                raise TarError(f"{self.where}: {printable(member.path)!r} is a {member.kind}: refused")
            yield member
        if not walk.has_end:
            raise TarError(
                f"{self.where}: cut off: it ends after {walk.size} bytes without the zeros that end an archive: copy "
                "or download it again"
            )

    def read(self, member: Member) -> bytes:
        """The bytes of a member."""
        data = self._bytes.read(member.start, member.size)
        if len(data) < member.size:
            raise TarError(f"{self.where}: {printable(member.path)!r}: the file became shorter while it was read")
        return data


class _Part(PositionalFile):
    """A member of an archive as if it were a file."""

    def __init__(self, path: Path, part: Member) -> None:
        super().__init__(path)
        self._start, self._size = part.start, part.size

    def read(self, start: int, size: int) -> bytes:
        return super().read(self._start + start, max(min(size, self._size - start), 0))

    def size(self) -> int:
        return self._size


class _PartWalk(TarWalk):
    def __init__(self, path: Path, part: _Part, where: str) -> None:
        super().__init__(path)
        self.path, self._file, self.size = where, part, part.size()


def read_small_members(path: Path, wanted: set[str], limit: int, total: int) -> dict[str, bytes]:
    """Those files of an archive, compressed or not, whose names without folders are `wanted`, all in memory.

    Raises:
        TarError: the archive is damaged or cut off, a file is there twice or is a link, or they are larger than `limit`
            each or `total` together.
    """
    found: dict[str, bytes] = {}
    with _blaming(path), tarfile.open(path, "r:*") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if name not in wanted or member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise TarError(f"{path}: {member.name!r} is a link or a special file: refused")
            if name in found:
                raise TarError(f"{path}: two files are named {name!r}")
            if member.size > limit or member.size + sum(map(len, found.values())) > total:
                raise TarError(f"{path}: {member.name!r} has {member.size} bytes, more than is plausible: refused")
            found[name] = tar.extractfile(member).read()
        while tar.fileobj.read(_CHUNK):  # the checksum of compressed data stands behind them
            pass
    return found


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise TarError(f"{path}: cut off: its compressed data end too early; copy or download it again") from None
    except (tarfile.TarError, zlib.error) as error:
        reason = str(error).partition(":\n")[0]  # what it says of each compression is left out
        raise TarError(f"{path}: damaged, cut off, or not a tar archive ({reason})") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise TarError(f"{path}: damaged ({error})") from None  # gzip's checksum
