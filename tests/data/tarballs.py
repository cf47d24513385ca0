"""Small tarballs for tests, written block by block where Python's `tarfile` would not write such a thing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

END = bytes(1024)


def image_bytes(number: int, size: tuple[int, int] = (12, 10), image_format: str = "PNG") -> bytes:
    """An image file that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def header(name: str, size: int = 0, kind: bytes = b"0", tar_format: int = tarfile.GNU_FORMAT, **more: object) -> bytes:
    """The header, or headers, of a member."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in more.items():
        setattr(info, field, value)
    return info.tobuf(tar_format, "utf-8", "surrogateescape")


def member(name: str, data: bytes = b"", kind: bytes = b"0", **more: object) -> bytes:
    """A member with its bytes."""
    return header(name, len(data), kind, **more) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def with_checksum(block: bytearray) -> bytes:
    """A header that was changed by hand."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def write_tarball(
    path: Path, files: Mapping[str, Optional[bytes]], tar_format: int = tarfile.GNU_FORMAT
) -> dict[str, bytes]:
    """A tarball of files, and of folders where the content is None; returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            tar.addfile(info, None if data is None else io.BytesIO(data))
    return {name: data for name, data in files.items() if data is not None}
