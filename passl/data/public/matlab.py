"""The one MATLAB file of ImageNet's development kit, `meta.mat`: as much of the format of version 5 as it needs.

SciPy reads such files too, and would be a dependency of 40 MB for 1000 names. The format is that of "MAT-File Format"
(MathWorks): elements of a type, a size and data that are padded to 8 bytes; a matrix is an element made of elements.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _FIRST_NUMBER, _LAST_NUMBER = 1, 2, 4, 6, 15
_NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_TEXTS = {1: "latin1", 2: "latin1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
_MAX_BYTES = 64 << 20  # decompressed; the published file has 2 MB
_MAX_DEPTH = 8
_MAX_ITEMS = 1_000_000


class _Element(NamedTuple):
    kind: int
    data: bytes


def read_variables(content: bytes) -> dict[str, Any]:
    """The variables of a little-endian MATLAB file of version 5.

    Text becomes a str, numbers a list, a cell array a list of its values, a struct array a list of dicts.

    Raises:
        ValueError: it is another file, damaged, or holds anything else.
    """
    if len(content) < _HEADER or content[124:128] != b"\x00\x01IM":
        raise ValueError("no MATLAB file of version 5, little-endian")
    variables = {}
    try:
        for element in _elements(content[_HEADER:]):
            if element.kind == _COMPRESSED:
                element = next(_elements(_decompressed(element.data)))
            if element.kind != _MATRIX:
                raise ValueError(f"an element of type {element.kind}, and no matrix")
            name, value = _matrix(element.data, 0)
            variables[name] = value
    except (StopIteration, IndexError, struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"truncated or damaged ({type(error).__name__})") from None
    return variables


def _decompressed(data: bytes) -> bytes:
    machine = zlib.decompressobj()
    content = machine.decompress(data, _MAX_BYTES)
    if machine.unconsumed_tail:
        raise ValueError(f"more than {_MAX_BYTES} bytes of data: refused")
    return content


def _elements(data: bytes) -> Iterator[_Element]:
    position = 0
    while position < len(data):
        kind, size = struct.unpack_from("<II", data, position)
        start = position + 8
        if kind >> 16:  # a small element: its size and its data are in the eight bytes of the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        if start + size > len(data):
            raise ValueError(f"truncated: an element needs {size} bytes, and {len(data) - start} are left")
        yield _Element(kind, data[start : start + size])
        end = start + size
        position = end if kind == _COMPRESSED else end + -end % 8


def _matrix(data: bytes, depth: int) -> tuple[str, Any]:
    if not data:
        return "", []
    if depth > _MAX_DEPTH:
        raise ValueError("matrices in matrices, too deep: refused")
    parts = _elements(data)
    kind = struct.unpack_from("<I", next(parts).data)[0] & 0xFF
    shape = _numbers(next(parts))
    name = next(parts).data.decode("latin1")
    count = math.prod(shape)
    if not 0 <= count <= _MAX_ITEMS:
        raise ValueError(f"a matrix of shape {shape}: refused")
    if kind == _CELL:
        return name, [_matrix(next(parts).data, depth + 1)[1] for _ in range(count)]
    if kind == _STRUCT:
        return name, _structs(parts, count, depth)
    if kind == _CHAR:
        text = next(parts, _Element(1, b""))
        return name, text.data.decode(_TEXTS.get(text.kind, "latin1"))
    if _FIRST_NUMBER <= kind <= _LAST_NUMBER:
        return name, _numbers(next(parts))
    raise ValueError(f"a matrix of class {kind}: refused")


def _structs(parts: Iterator[_Element], count: int, depth: int) -> list[dict[str, Any]]:
    width = _numbers(next(parts))[0]
    raw = next(parts).data
    if width < 1 or count * (len(raw) // width) > _MAX_ITEMS:
        raise ValueError(f"{count} structs with names of {width} bytes: refused")
    fields = [raw[start : start + width].split(b"\0")[0].decode("latin1") for start in range(0, len(raw), width)]
    return [{field: _matrix(next(parts).data, depth + 1)[1] for field in fields} for _ in range(count)]


def _numbers(element: _Element) -> list:
    if element.kind not in _NUMBERS:
        raise ValueError(f"numbers of type {element.kind}")
    dtype = np.dtype(_NUMBERS[element.kind])
    return np.frombuffer(element.data[: len(element.data) // dtype.itemsize * dtype.itemsize], dtype).tolist()
