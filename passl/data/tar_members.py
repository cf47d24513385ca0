"""What is in a tarball, and where: a walk from header to header that reads no file's bytes.

Python's `tarfile` takes several times as long, keeps all that it has seen, and ends without a word at a damaged header.
Formats: POSIX.1-2017, "pax" (ustar interchange format and its extended headers); GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional, Union

BLOCK = 512
FILE, DIRECTORY, HARD_LINK, SPARSE = "file", "directory", "hard link", "sparse file"
_ZEROS = bytes(BLOCK)
# POSIX's contiguous file (7) is a regular one; type NUL is how tar of before 1988 wrote regular files.
_KINDS = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,
    b"5": DIRECTORY,
    b"1": HARD_LINK,
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "fifo",
    b"V": "volume label",
    b"S": SPARSE,
}
_WITHOUT_DATA = frozenset(_KINDS.values()) - {FILE, SPARSE}
_MAX_EXTENDED_HEADER = 16 << 20  # Linux allows 64 KiB of extended attributes a file.
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip --keep"),
    (b"BZh", "bzip2", "bunzip2 --keep"),
    (b"\xfd7zXZ\0", "xz", "unxz --keep"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
)


class TarError(ValueError):
    """A tarball that is damaged, cut off, compressed or none, or an index that does not fit it; the text names it."""


class Member(NamedTuple):
    """Something in a tarball: the bytes of a file are `start .. start + size - 1` of the tarball.

    `kind` is FILE, DIRECTORY, HARD_LINK, SPARSE or in words what else; `link` is the member that a hard link repeats.
    """

    path: str
    kind: str
    start: int
    size: int
    link: str = ""


class PositionalFile:
    """A file for reading at any place; safe to use from several threads, and across forks and pickling."""

    def __init__(self, path: Union[str, os.PathLike]) -> None:
        self.path = os.fspath(path)
        self._file: Optional[io.FileIO] = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_file": None}

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`, or as many as there are. Raises OSError."""
        if not hasattr(os, "pread"):  # Windows
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(size)
        if self._file is None:
            self._file = io.FileIO(self.path)  # closed with the object
        # pread leaves the position alone, which a fork shares with its parent.
        return os.pread(self._file.fileno(), size, start)

    def size(self) -> int:
        """Bytes. Raises FileNotFoundError; IsADirectoryError for a folder; TarError for a pipe or a device."""
        path = Path(self.path)
        if path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder, not a tarball")
        if not path.exists():
            raise FileNotFoundError(f"there is no file {self.path}")
        if not path.is_file():  # opening a pipe waits for its writer
            raise TarError(
                f"{self.path} is a pipe or a device; images are read from anywhere in a tarball, which must be a file"
            )
        return path.stat().st_size


def printable(name: str) -> str:
    """`name` for a message: bytes that are not UTF-8 (surrogates, in Python) as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class TarWalk:
    """The members of one tarball, in its order.

    Args:
        ignore_zeros: read on behind the end of the archive, for tarballs that were joined with `cat`.

    Attributes:
        offset: where the walk is; after the last member, where the archive ends.
        last: path of the last member so far.
        has_end: the blocks of zeros that end an archive are there.
    """

    def __init__(self, tarball: Union[str, os.PathLike], ignore_zeros: bool = False) -> None:
        self.path = os.fspath(tarball)
        self.offset = 0
        self.has_end = False
        self._ignore_zeros = ignore_zeros
        self._file = PositionalFile(tarball)
        self.size = self._file.size()
        self.last = ""
        self._global: dict[str, str] = {}

    def __iter__(self) -> Iterator[Member]:
        """Raises TarError: the file is no tarball, or damaged or cut off; the text says where."""
        extended: dict[str, str] = {}
        while True:
            offset, header = self.offset, self._file.read(self.offset, BLOCK)
            if header == _ZEROS or not header:
                if not self._goes_on(header):
                    return
                continue
            if len(header) < BLOCK or not _checksum_is_right(header):
                raise self._no_header(header)
            self.offset += BLOCK
            code = header[156:157]
            if code in b"xXgLK":
                self._read_extended(code, header, extended)
                continue
            member = self._member(code, header, {**self._global, **extended})
            extended = {}
            if member.kind not in _WITHOUT_DATA:
                self.offset = member.start + -(-member.size // BLOCK) * BLOCK
                if member.start + member.size > self.size:
                    what = f"{printable(member.path)!r} needs {member.size} bytes at {member.start}"
                    raise self._cut_off(what, offset)
            self.last = member.path
            yield member

    # --- headers ---

    def _member(self, code: bytes, header: bytes, extended: dict[str, str]) -> Member:
        size = self._size(header, extended)
        path = extended.get("path") or path_in(header)
        kind = _KINDS.get(code, f"member of type {code!r}")
        if any(key.startswith("GNU.sparse.") for key in extended):
            kind, path = SPARSE, extended.get("GNU.sparse.name", path)
        elif code == b"\0" and path.endswith("/"):
            kind = DIRECTORY
        elif code == b"S":
            self._skip_sparse_map(header)
        elif code == b"M":
            raise TarError(
                f"{self.path}: {printable(path)!r} at offset {self.offset - BLOCK} continues a file of another "
                "volume: join the volumes by unpacking and packing them again"
            )
        link = extended.get("linkpath") or _text(header[157:257]) if kind == HARD_LINK else ""
        return Member(path, kind, self.offset, size, link)

    def _size(self, header: bytes, extended: dict[str, str]) -> int:
        try:
            size = int(extended["size"]) if "size" in extended else _number(header[124:136])
        except ValueError:
            size = -1
        if size < 0:
            raise TarError(
                f"{self.path}: damaged: {printable(path_in(header))!r} at offset {self.offset - BLOCK} has a size that "
                "is no number"
            )
        return size

    def _skip_sparse_map(self, header: bytes) -> None:
        more = header[482]
        while more:
            block = self._file.read(self.offset, BLOCK)
            if len(block) < BLOCK:
                raise self._cut_off("the map of a sparse file goes on", self.offset)
            self.offset += BLOCK
            more = block[504]

    def _read_extended(self, code: bytes, header: bytes, extended: dict[str, str]) -> None:
        """Take in a header that describes the next member, or (`g`) all that follow."""
        start, size = self.offset, self._size(header, {})
        if size > _MAX_EXTENDED_HEADER:
            raise TarError(f"{self.path}: damaged: an extended header of {size} bytes at offset {start - BLOCK}")
        data = self._file.read(start, size)
        if len(data) < size:
            raise self._cut_off(f"an extended header needs {size} bytes at {start}", start - BLOCK)
        self.offset += -(-size // BLOCK) * BLOCK
        if code in b"LK":
            extended["path" if code == b"L" else "linkpath"] = _text(data)
            return
        try:
            records = _pax_records(data)
        except ValueError as error:
            raise TarError(f"{self.path}: damaged: the extended header at offset {start - BLOCK}: {error}") from error
        (self._global if code == b"g" else extended).update(records)

    # --- the end, and what is none ---

    def _goes_on(self, header: bytes) -> bool:
        """Whether there is more after the zeros at `offset`; it is then at the next header."""
        if not header:
            if self.size == 0:
                raise TarError(f"{self.path} is empty (0 bytes)")
            return False
        self.has_end = True
        end = self.offset
        while header == _ZEROS:
            self.offset += BLOCK
            header = self._file.read(self.offset, BLOCK)
        if len(header) < BLOCK or not _checksum_is_right(header):
            return False  # Whatever it is: tar would not look at it either.
        if self._ignore_zeros:
            return True
        raise TarError(
            f"{self.path}: the archive ends at offset {end}, and another one follows at {self.offset}: joined with "
            "cat? Add --ignore_zeros to read on, or join tarballs with tar --concatenate"
        )

    def _no_header(self, header: bytes) -> TarError:
        if self.offset:
            if len(header) < BLOCK:
                return self._cut_off("a header goes on", self.offset)
            return TarError(f"{self.path}: damaged: no header at offset {self.offset}, behind {printable(self.last)!r}")
        path = shlex.quote(self.path)
        for magic, name, command in _COMPRESSED:
            if header.startswith(magic):
                return TarError(
                    f"{self.path} is compressed ({name}); images are read from anywhere in a tarball, which needs "
                    f"it uncompressed: {command} {path}"
                )
        if header.startswith(b"PK\x03\x04"):
            return TarError(f"{self.path} is a zip file: unpack it, and pack it again with tar -cf NAME.tar FOLDER")
        return TarError(f"{self.path} is not a tarball")

    def _cut_off(self, what: str, offset: int) -> TarError:
        behind = f", behind {printable(self.last)!r}" if self.last else ""
        return TarError(
            f"{self.path}: cut off: at offset {offset}{behind}: {what}, and the file ends at {self.size}: copy or "
            "download it again"
        )


def header_before(file: PositionalFile, start: int) -> Optional[Member]:
    """What the header directly before the bytes at `start` says; None if there is none.

    A long path is cut off in it, and a size of 8 GiB or more may be 0. Raises OSError.
    """
    header = file.read(start - BLOCK, BLOCK) if start >= BLOCK else b""
    if len(header) < BLOCK or not _checksum_is_right(header):
        return None
    try:
        size = _number(header[124:136])
    except ValueError:
        return None
    return Member(path_in(header), _KINDS.get(header[156:157], "unknown"), start, size)


# --- fields ---------------------------------------------------------------------------------------------------------


def _checksum_is_right(header: bytes) -> bool:
    try:
        recorded = _number(header[148:156])
    except ValueError:
        return False
    total = sum(header) - sum(header[148:156]) + 8 * 0x20  # its own place counts as blanks
    # Some old programs added signed bytes.
    return recorded == total or recorded == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes) -> int:
    """Octal digits or, where those are too few, base 256 behind a byte 0x80 (GNU). Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def path_in(header: bytes) -> str:
    """The path in a header of 512 bytes, if no other header before it has the whole of it."""
    path = _text(header[:100])
    # Where POSIX has a prefix, GNU's own format has times.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{path}" if prefix else path


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines of "length key=value"; the length counts all of its line. Raises ValueError."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 20)
        length = int(data[position:space]) if space > 0 else 0
        key, equals, value = data[space + 1 : position + length - 1].partition(b"=")
        if length < 5 or not equals or data[position + length - 1 : position + length] != b"\n":
            raise ValueError(f"no record at its byte {position}")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records
