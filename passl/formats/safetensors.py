"""The safetensors format (huggingface/safetensors, README "Format"): the size of a JSON header in 8 bytes, the header,
the numbers. Mapped, not read; everything that the header says is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

import numpy as np

from passl.formats.atomic import replacing
from passl.formats.limits import Budget, CheckpointFormatError, blaming, shown
from passl.formats.storage import (
    ELEMENTS,
    MAX_DIMENSIONS,
    Element,
    MappedFile,
    Storage,
    byte_size,
    checked_element,
    content,
    contiguous_strides,
    widens,
)

# The official reader takes 100 MB, which Python would turn into gigabytes; 1000 tensors have 0.1 MB.
_MAX_HEADER = 16 << 20
_MAX_DIGITS = 19
# In the order in which the official writer has the tensors.
_TYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_KINDS = {element: kind for kind, element in _TYPES.items()}


def load_safetensors(path: Union[str, Path], bfloat16: Literal["float32", "bits"] = "float32") -> dict[str, np.ndarray]:
    """Name -> array of a ``.safetensors`` file: read-only, C-contiguous views of the mapped file.

    bfloat16, which numpy does not have, comes as float32 of the same values, or with ``bfloat16="bits"`` in arrays of
    type ``BFLOAT16``. The file must not be written to while the arrays live (replacing or deleting it is harmless). The
    header's ``__metadata__`` is left out.

    Raises:
        CheckpointFormatError: the file is missing, damaged, or not in this format.
    """
    path, widen = Path(path), widens(bfloat16)
    with blaming(path, "a safetensors file"), MappedFile(path) as file:
        return _read(file, widen)


def _read(file: MappedFile, widen: bool) -> dict[str, np.ndarray]:
    header_size = int.from_bytes(file.map[:8], "little")
    if header_size > min(file.size - 8, _MAX_HEADER):
        raise CheckpointFormatError(
            f"truncated, or not a safetensors file: a header of {header_size} bytes in {file.size} bytes"
        )
    header = json.loads(
        file.map[8 : 8 + header_size].decode("utf-8"),
        object_pairs_hook=_without_duplicates,
        parse_int=_integer,
        parse_float=_refuse_number,
        parse_constant=_refuse_number,
    )
    if not isinstance(header, dict):
        raise CheckpointFormatError("not a safetensors file: its header is no table")
    header.pop("__metadata__", None)
    ranges = {name: _checked(name, entry) for name, entry in header.items()}
    _check_cover(ranges, file.size - 8 - header_size)
    budget = Budget(file.size)
    arrays = {}
    for name, (element, shape, start, end) in ranges.items():
        buffer, offset = file.bytes_at(8 + header_size + start, end - start, element.raw.itemsize)
        storage = Storage(buffer, offset, element, (end - start) // element.raw.itemsize, budget, widen)
        arrays[name] = storage.tensor(0, shape, contiguous_strides(shape))
    return arrays


def _checked(name: str, entry: Any) -> tuple[Element, tuple[int, ...], int, int]:
    """Type, shape, first byte and end of a tensor, of which each is possible by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointFormatError(f"the header's {shown(name)} must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _TYPES:
        raise CheckpointFormatError(f"{shown(name)} is of type {shown(kind)}; known are {', '.join(_TYPES)}")
    if not (_are_sizes(shape) and len(shape) <= MAX_DIMENSIONS and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointFormatError(f"{shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}")
    element = ELEMENTS[_TYPES[kind]]
    if offsets[1] - offsets[0] != byte_size(element, shape):
        raise CheckpointFormatError(f"{shown(name)} of shape {shape} and type {kind} has data_offsets {offsets}")
    return element, tuple(shape), offsets[0], offsets[1]


def _check_cover(ranges: dict[str, tuple[Element, tuple[int, ...], int, int]], size: int) -> None:
    """The tensors follow each other without a gap, as the format demands: no byte is of two tensors, or of none."""
    end = 0
    for name, (_, _, start, stop) in sorted(ranges.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise CheckpointFormatError(f"{shown(name)} starts at byte {start}, where byte {end} is next")
        end = stop
    if end != size:
        raise CheckpointFormatError(f"truncated or damaged: the tensors take {end} bytes, the file has {size}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise CheckpointFormatError("the header has a name twice")
    return table


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise CheckpointFormatError(f"the header has a number of {len(text)} digits")
    return int(text)


def _refuse_number(text: str) -> None:
    raise CheckpointFormatError(f"the header has the number {shown(text)}, where only integers belong")


# --- writing ---------------------------------------------------------------------------------------------------------


def save_safetensors(
    state: Mapping[str, np.ndarray], path: Union[str, Path], metadata: Optional[Mapping[str, str]] = None
) -> None:
    """Write a flat table name -> array as a ``.safetensors`` file.

    Tensors are in the official writer's order, by type, large ones first, then by name: each is aligned, and
    equal tables give equal bytes in whatever order they are. Arrays are written one after the other; the file replaces
    what is at ``path`` when it is whole. ``metadata`` is text for the header (``{"format": "pt"}`` where Hugging Face's
    tools are to read the file).

    Raises:
        ValueError: a name is no text, a value no array, its type unknown to the format, or metadata are no texts.
        OSError: the disk is full, or the folder missing or read-only.
    """
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError(f"metadata ({dict(metadata)!r}) of a .safetensors file must be text -> text")
        header["__metadata__"] = dict(sorted(metadata.items()))
    kinds = {name: _kind(name, value) for name, value in state.items()}
    names = sorted(state, key=lambda name: (list(_TYPES).index(kinds[name]), name))
    end = 0
    for name in names:
        start, end = end, end + byte_size(ELEMENTS[_TYPES[kinds[name]]], state[name].shape)
        header[name] = {"dtype": kinds[name], "shape": list(state[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(content(state[name]))


def _kind(name: Any, value: Any) -> str:
    """The format's word for the type of an array."""
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"a name in a .safetensors file must be text, and not '__metadata__': {shown(name)}")
    if not isinstance(value, np.ndarray):
        raise ValueError(
            f"{name!r} is a {type(value).__name__}: a .safetensors file is one flat table name -> array. Give the part "
            "that is one, or write a .pth file with save_torch"
        )
    return _KINDS[checked_element(value, repr(name), tuple(_KINDS)).name]
