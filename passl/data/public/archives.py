"""Tar archives, also inside others: every member checked, and an archive that ends too early named."""

from __future__ import annotations

import contextlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Union

_BLOCK = 512


class Member(NamedTuple):
    """A file in an archive: its full name, and where its bytes are."""

    name: str
    start: int
    size: int


def members(file: BinaryIO, where: str) -> Iterator[Member]:
    """The files of an uncompressed archive in their order. Folders and hidden files (macOS adds `._name`) are left out.

    `file` may be moved between two members.

    Raises:
        ValueError: the archive is truncated, damaged, compressed or no archive, or a member is no plain file; the text
            says where.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # of a million, they would all stay in memory
                if member.offset_data + member.size > size:
                    raise _truncated(where, member.offset_data + member.size, size, member.name)
                if member.isdir() or member.name.rpartition("/")[2].startswith("."):
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{where}: {member.name!r} is a link or a special file: refused")
                yield Member(member.name, member.offset_data, member.size)
            _check_end(file, tar.offset, size, where)
    except tarfile.TarError as error:
        if size < _BLOCK or "unexpected end" in str(error):
            raise ValueError(f"{where}: truncated: it ends after {size} bytes") from None
        raise ValueError(f"{where}: damaged, or not an uncompressed tar archive ({error})") from None


def _check_end(file: BinaryIO, position: int, size: int, where: str) -> None:
    """tarfile takes whatever it cannot read, and the end of the file, for the end of the archive, which is zeros."""
    file.seek(position)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise ValueError(f"{where}: truncated: it ends after {size} bytes, without the mark of an archive's end")
    if any(block):
        raise ValueError(f"{where}: damaged at byte {position}: no header of a file is there")


def _truncated(where: str, needed: int, size: int, member: str) -> ValueError:
    return ValueError(f"{where}: truncated: {member!r} ends at byte {needed}, and the archive at {size}")


class Section(io.RawIOBase):
    """Bytes `start` to `start + size` of a file as a file of their own: an archive in an archive, without a copy."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        wanted = max(min(len(buffer), self._size - self._position), 0)
        self._file.seek(self._start + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The bytes of a member."""
    file.seek(member.start)
    return file.read(member.size)


def read_small_members(path: Path, wanted: set[str], limit: int, total: int) -> dict[str, bytes]:
    """Those files of an archive, compressed or not, whose names without folders are `wanted`, all in memory.

    Raises:
        ValueError: the archive is damaged or truncated, a file is there twice, or they are larger than `limit` each or
            `total` together.
    """
    found: dict[str, bytes] = {}
    with _blaming(path), tarfile.open(path, "r:*") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if name not in wanted or member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(f"{path}: {member.name!r} is a link or a special file: refused")
            if name in found:
                raise ValueError(f"{path}: two files are named {name!r}")
            if member.size > limit or member.size + sum(map(len, found.values())) > total:
                raise ValueError(f"{path}: {member.name!r} has {member.size} bytes, more than is plausible: refused")
            content = tar.extractfile(member)
            found[name] = content.read() if content else b""
        while tar.fileobj.read(1 << 20):  # the checksum of compressed data stands behind them
            pass
    return found


@contextlib.contextmanager
def _blaming(path: Union[str, Path]) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise ValueError(f"{path}: truncated: its compressed data end too early") from None
    except (tarfile.TarError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged, truncated, or not a tar archive ({error})") from None
