"""Members of a zip archive as ranges of a mapped file: everything checked, nothing unpacked.

Python's zipfile is not used: it reads and unpacks members, and here they are to stay where they are. The format is
that of PKWARE's APPNOTE 6.3.9, sections 4.3 (records) and 4.5.3 (64-bit sizes).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from passl.formats.limits import CheckpointFormatError
from passl.formats.storage import MappedFile

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_MAX_MEMBERS = 200_000
_IN_EXTRA_FIELD = 0xFFFFFFFF


class Member(NamedTuple):
    """A member: ``size`` bytes from ``start`` on. ``refusal`` says why they are not its content, if they are not."""

    name: str
    start: int
    size: int
    checksum: int
    refusal: str


def zip_members(file: MappedFile) -> dict[str, Member]:
    """Members by name.

    Raises:
        CheckpointFormatError: the archive is truncated or damaged, has a member twice, overlapping members, or names
            that lead out of a folder.
    """
    start, size, count = _directory(file)
    if count > _MAX_MEMBERS:
        raise CheckpointFormatError(f"an archive of {count} members (at most {_MAX_MEMBERS}): refused")
    members: dict[str, Member] = {}
    for member in _entries(file, start, start + size, count):
        if member.name in members:
            raise CheckpointFormatError(f"the archive has {member.name!r} twice")
        members[member.name] = member
    end = 0
    for member in sorted(members.values(), key=lambda member: member.start):
        if member.start < end or member.start + member.size > start:
            raise CheckpointFormatError(f"damaged archive: {member.name!r} overlaps what stands beside it")
        end = member.start + member.size
    return members


def check_member(file: MappedFile, member: Member) -> None:
    """Raises:
    CheckpointFormatError: the member is compressed or encrypted (so nothing is ever unpacked to a size that only the
        file claims), or its bytes do not have the checksum that the archive states.
    """
    if member.refusal:
        raise CheckpointFormatError(f"{member.name!r} in the archive is {member.refusal}")
    if not member.checksum:  # so torch.save writes after set_crc32_options(False)
        return
    value = 0
    view = memoryview(file.map)[member.start : member.start + member.size]
    for position in range(0, member.size, 1 << 24):
        value = zlib.crc32(view[position : position + (1 << 24)], value)
    if value != member.checksum:
        raise CheckpointFormatError(f"damaged: {member.name!r} does not have the checksum that the archive states")


def _directory(file: MappedFile) -> tuple[int, int, int]:
    """Start, size and number of entries of the central directory."""
    end = file.map.rfind(b"PK\x05\x06", max(0, file.size - _END.size - _MAX_COMMENT))
    if end < 0 or end + _END.size > file.size:
        raise CheckpointFormatError("truncated: the archive's directory, at its end, is missing")
    _, disk, first_disk, _, count, size, start, _ = _END.unpack_from(file.map, end)
    if end >= _LOCATOR_64.size:
        signature, _, position, _ = _LOCATOR_64.unpack_from(file.map, end - _LOCATOR_64.size)
        if signature == b"PK\x06\x07":
            if position + _END_64.size > end:
                raise CheckpointFormatError("damaged archive: its 64-bit directory is out of place")
            signature, _, _, _, disk, first_disk, _, count, size, start = _END_64.unpack_from(file.map, position)
            end = position
            if signature != b"PK\x06\x06":
                raise CheckpointFormatError("damaged archive: its 64-bit directory is out of place")
    if disk or first_disk or start + size > end or count * _ENTRY.size > size:
        raise CheckpointFormatError(f"damaged archive: {count} entries in {size} bytes from byte {start} on")
    return start, size, count


def _entries(file: MappedFile, position: int, end: int, count: int) -> Iterator[Member]:
    for _ in range(count):
        if position + _ENTRY.size > end:
            raise CheckpointFormatError("damaged archive: its directory ends too early")
        fields = _ENTRY.unpack_from(file.map, position)
        signature, flags, method, checksum, packed, size = (fields[i] for i in (0, 3, 4, 7, 8, 9))
        name_size, extra_size, comment_size, local = (fields[i] for i in (10, 11, 12, 16))
        position += _ENTRY.size
        if signature != b"PK\x01\x02" or position + name_size + extra_size + comment_size > end:
            raise CheckpointFormatError("damaged archive: its directory makes no sense")
        raw_name = file.map[position : position + name_size]
        extra = file.map[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        size, packed, local = _wide_sizes(extra, size, packed, local)
        name = _checked_name(raw_name)
        refusal = ""
        if method or flags & 1 or packed != size:
            kind = "encrypted" if flags & 1 else "compressed"
            refusal = f"{kind}, as torch.save never does: refused. Unpack the archive and pack it without compression"
        yield Member(name, _data_start(file, local, raw_name, method), packed, checksum, refusal)


def _wide_sizes(extra: bytes, *sizes: int) -> list[int]:
    """``sizes`` with those that did not fit 32 bits taken from the extra field 1, in the same order."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = iter(struct.iter_unpack("<Q", extra[position + 4 : position + 4 + length // 8 * 8]))
            return [next(wide, (size,))[0] if size == _IN_EXTRA_FIELD else size for size in sizes]
        position += 4 + length
    return list(sizes)


def _checked_name(raw: bytes) -> str:
    name = raw.decode("utf-8", "backslashreplace")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise CheckpointFormatError(f"{name!r} in the archive leads out of its folder: refused")
    return name


def _data_start(file: MappedFile, local: int, name: bytes, method: int) -> int:
    if local + _LOCAL.size > file.size:
        raise CheckpointFormatError(f"damaged archive: {name!r} starts behind its end")
    fields = _LOCAL.unpack_from(file.map, local)
    start = local + _LOCAL.size + fields[9]
    if fields[0] != b"PK\x03\x04" or fields[3] != method or file.map[local + _LOCAL.size : start] != name:
        raise CheckpointFormatError(f"damaged archive: {name!r} is not where its directory says")
    return start + fields[10]
