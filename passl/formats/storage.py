"""Bytes of a file as numpy arrays: mapped into memory, checked before anything is allocated, copied where needed."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from passl.formats.limits import Budget, CheckpointFormatError, shown

MAX_DIMENSIONS = 32  # of numpy 1
Buffer = Union[mmap.mmap, np.ndarray]


class Element(NamedTuple):
    """A type of numbers: PyTorch's name of it, and the dtype of its bytes in a file (little endian)."""

    name: str
    raw: np.dtype


# numpy has no bfloat16: this marks its bits, as `array["bfloat16"]` gives them, so that they are not taken for numbers.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])

# bfloat16 is read as its bits, and bool as bytes: both are looked at before they become arrays.
ELEMENTS = {
    name: Element(name, np.dtype(code))
    for name, code in {
        "float64": "<f8",
        "float32": "<f4",
        "float16": "<f2",
        "bfloat16": "<u2",
        "int64": "<i8",
        "int32": "<i4",
        "int16": "<i2",
        "int8": "i1",
        "uint8": "u1",
        "uint16": "<u2",
        "uint32": "<u4",
        "uint64": "<u8",
        "bool": "u1",
        "complex64": "<c8",
        "complex128": "<c16",
    }.items()
}


def checked_element(value: np.ndarray, where: str, known: tuple[str, ...]) -> Element:
    """The type of an array's numbers.

    Raises:
        ValueError: it is none of ``known``; the text says ``where``.
    """
    element = ELEMENTS["bfloat16"] if value.dtype == BFLOAT16 else ELEMENTS.get(value.dtype.name)
    if element is None or element.name not in known:
        raise ValueError(f"{where} has numbers of type {value.dtype}, must be one of {', '.join(known)}: use .astype")
    return element


def content(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order and little endian; a view of it where it has them so in memory."""
    dense = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    return dense.reshape(-1).view(np.uint8)


class MappedFile:
    """A file mapped read-only; a context manager. Arrays made from it keep the mapping, not the file, open.

    Raises:
        CheckpointFormatError: there is no such file, or it is empty.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointFormatError("no such file" if not path.exists() else "not a file")
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size
        if not self.size:
            self._file.close()
            raise CheckpointFormatError("the file is empty")
        self.map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def bytes_at(self, start: int, size: int, alignment: int) -> tuple[Buffer, int]:
        """Where ``size`` bytes from ``start`` are: a buffer and an offset in it that is a multiple of ``alignment``.

        It is the mapping itself where that fits, else a copy: numpy works on misaligned numbers, but slowly.

        Raises:
            CheckpointFormatError: the file ends before.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise CheckpointFormatError(
                f"truncated: {size} bytes from byte {start} on are missing: the file has {self.size}"
            )
        if start % alignment == 0:
            return self.map, start
        copy = np.empty(size, np.uint8)
        self._file.seek(start)
        if self._file.readinto(memoryview(copy)) != size:
            raise CheckpointFormatError("the file changed while it was read")
        return copy, 0


def widens(bfloat16: str) -> bool:
    """Whether bfloat16 is to become float32: the readers' option of that name.

    Raises:
        ValueError: the option is neither of its two values.
    """
    if bfloat16 not in ("float32", "bits"):
        raise ValueError(f"bfloat16 ({bfloat16!r}) must be 'float32' (its values) or 'bits' (arrays of type BFLOAT16)")
    return bfloat16 == "float32"


def read_array(
    buffer: Buffer,
    start: int,
    element: Element,
    shape: Sequence[int],
    strides: Sequence[int],
    budget: Budget,
    widen: bool = True,
) -> np.ndarray:
    """The numbers at byte ``start`` of ``buffer`` as a read-only C-contiguous array of ``shape``.

    A view of the buffer if they lie there in that order, else a copy. bfloat16 becomes float32, which has every
    bfloat16 value, or without ``widen`` an array of type ``BFLOAT16``. The bounds have to be checked before;
    ``strides`` count elements.
    """
    item = element.raw.itemsize
    array = np.ndarray(tuple(shape), element.raw, buffer, start, tuple(stride * item for stride in strides))
    if not (array.flags.c_contiguous and array.flags.aligned):
        budget.spend(array.nbytes)
        array = array.copy(order="C")
    if element.name == "bfloat16" and not widen:
        array = array.view(BFLOAT16)
    elif element.name == "bfloat16":
        budget.spend(2 * array.nbytes)
        wide = array.astype(np.uint32)
        wide <<= 16
        array = wide.view(np.float32)
    elif element.name == "bool":
        if array.size and array.max() > 1:
            raise CheckpointFormatError("damaged: a bool tensor holds other bytes than 0 and 1")
        array = array.view(np.bool_)
    array.flags.writeable = False
    return array


class Storage:
    """A run of ``numel`` numbers of type ``element`` in a buffer, which tensors view; ``widen``: :func:`read_array`."""

    name = "a storage"

    def __init__(
        self, buffer: Buffer, start: int, element: Element, numel: int, budget: Budget, widen: bool = True
    ) -> None:
        self.numel, self._widen = numel, widen
        self._buffer, self._start, self._element, self._budget = buffer, start, element, budget
        self._tensors: dict[tuple, np.ndarray] = {}

    def part(self, offset: Any, numel: Any) -> Storage:
        """The ``numel`` numbers from ``offset`` on, as files older than PyTorch 0.4 share storages."""
        if not (_is_size(offset) and _is_size(numel) and offset + numel <= self.numel):
            raise CheckpointFormatError(f"a view of {shown(numel)} numbers from {shown(offset)} on exceeds its storage")
        start = self._start + offset * self._element.raw.itemsize
        return Storage(self._buffer, start, self._element, numel, self._budget, self._widen)

    def tensor(self, offset: Any, shape: Any, strides: Any, element: Optional[Element] = None) -> np.ndarray:
        """The tensor that starts ``offset`` numbers into the storage (see :func:`read_array`); equal views are one.

        Args:
            shape, strides: tuples, strides in numbers.
            element: type of the tensor's numbers where the storage is only bytes.

        Raises:
            CheckpointFormatError: the description makes no sense, or reaches outside of the storage.
        """
        element = element or self._element
        shape, strides = _sizes(shape, "shape"), _sizes(strides, "strides")
        if len(shape) != len(strides) or not _is_size(offset):
            raise CheckpointFormatError(f"a tensor of shape {shape} has offset {shown(offset)} and strides {strides}")
        item = element.raw.itemsize
        available = self.numel * self._element.raw.itemsize // item
        if 0 in shape:
            strides = (0,) * len(shape)
            offset = 0
        elif offset + sum((size - 1) * stride for size, stride in zip(shape, strides)) >= available:
            raise CheckpointFormatError(
                f"a tensor of shape {shape}, strides {strides}, offset {offset} reaches outside of its storage of "
                f"{available} numbers"
            )
        key = (offset, shape, strides, element.name)
        if key not in self._tensors:
            self._tensors[key] = self._read(offset * item, element, shape, strides)
        return self._tensors[key]

    def _read(self, offset: int, element: Element, shape: tuple, strides: tuple) -> np.ndarray:
        if 0 in shape:
            return read_array(np.empty(0, np.uint8), 0, element, shape, strides, self._budget, self._widen)
        return read_array(self._buffer, self._start + offset, element, shape, strides, self._budget, self._widen)


def byte_size(element: Element, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * element.raw.itemsize


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a dense tensor in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS or not all(map(_is_size, value)):
        raise CheckpointFormatError(
            f"the {what} of a tensor must be at most {MAX_DIMENSIONS} sizes, not {shown(value)}"
        )
    return tuple(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
