"""The safetensors format: all its types to the bit, and everything that breaks its rules refused."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from pathlib import Path
from typing import Any, Union

import numpy as np
import pytest

from passl.convert import CheckpointFormatError, load_safetensors, load_torch

pytestmark = pytest.mark.smoke

TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(path: Path, header: Union[dict, bytes], data: bytes = FLOATS.tobytes()) -> Path:
    """A file with a header, given as a table or as it is, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("padding", range(8))  # the numbers are aligned in one case, and in the others not
def test_all_types_to_the_bit(tmp_path, padding):
    generator = np.random.default_rng(padding)
    arrays = {
        kind: generator.integers(0, 2 if kind == "BOOL" else 100, (3, 5)).astype(dtype) for kind, dtype in TYPES.items()
    }
    arrays.update(scalar=np.float32(3.5).reshape(()), empty=np.zeros((0, 4), np.float32))
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        kind = name if name in TYPES else "F32"
        header[name] = entry(kind, array.shape, (len(data), len(data) + array.nbytes))
        data += array.tobytes()
    path = write(tmp_path / "w.safetensors", json.dumps(header).encode() + b" " * padding, data)
    for found in (load_safetensors(path), load_torch(path)):
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].flags.c_contiguous
            assert not found[name].flags.writeable
            np.testing.assert_array_equal(found[name], array)


def test_bfloat16_keeps_its_values(tmp_path):
    bits = np.arange(0, 0x7F80, dtype=np.uint16)  # all that are positive and finite
    header = {"w": entry("BF16", bits.shape, (0, bits.nbytes))}
    found = load_safetensors(write(tmp_path / "w.safetensors", header, bits.tobytes()))["w"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32) >> 16, bits)
    assert not (found.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": entry(shape=(2, 4))}, "of shape .2, 4. and type F32 has data_offsets"),
        ({"w": entry(shape=(2**40, 2**40))}, "has data_offsets"),
        ({"w": entry(shape=(-2, -3))}, "has shape"),
        ({"w": entry(shape=(2.0, 3))}, "where only integers belong"),
        ({"w": entry(shape=(True, 6))}, "has shape"),
        ({"w": entry(shape=6)}, "has shape"),
        ({"w": entry(shape=(1,) * 33)}, "has shape"),
        ({"w": entry(offsets=(0, 28), shape=(7,))}, "the tensors take 28 bytes, the file has 24"),
        ({"w": entry(offsets=(0, 20), shape=(5,))}, "the tensors take 20 bytes, the file has 24"),
        ({"w": entry(offsets=(4, 24), shape=(5,))}, "starts at byte 4, where byte 0 is next"),
        ({"w": entry(offsets=(24, 0))}, "has data_offsets"),
        ({"w": entry(offsets=(0, 24, 24))}, "data_offsets"),
        ({"w": entry(), "v": entry()}, "starts at byte 0, where byte 24 is next"),
        ({"w": entry("F8_E4M3", offsets=(0, 6))}, "of type 'F8_E4M3'; known are U64, I64"),
        ({"w": entry(["F32"])}, "of type .*; known are"),
        ({"w": {"dtype": "F32", "shape": [2, 3]}}, "must have dtype, shape and data_offsets"),
        ({"w": [1]}, "must have dtype"),
        ({}, "the tensors take 0 bytes, the file has 24"),
        (b"[]", "its header is no table"),
        (b"{", "damaged, or not a safetensors file"),
        (b"\xff\xfe", "damaged, or not a safetensors file"),
        (b'{"w": NaN}', "the number 'NaN'"),
        (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "a name twice"),
        (b'{"w": ' + b"9" * 100_000 + b"}", "a number of 100000 digits"),
        (b"[" * 100_000, "damaged, or not a safetensors file"),
    ],
)
def test_broken_rules_are_refused(tmp_path, header, message):
    path = write(tmp_path / "w.safetensors", header)
    with pytest.raises(CheckpointFormatError, match=message) as found:
        load_safetensors(path)
    assert str(found.value).startswith(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"\x01", b"\xff" * 8, b"\xff" * 100, bytes(8), struct.pack("<Q", 2**40) + b"{}"]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match="empty|truncated|damaged"):
        load_torch(tmp_path / "w.safetensors")


def test_bool_of_other_bytes_is_refused(tmp_path):
    with pytest.raises(CheckpointFormatError, match="other bytes than 0 and 1"):
        load_safetensors(write(tmp_path / "w.safetensors", {"w": entry("BOOL", (2,), (0, 2))}, b"\x01\x02"))


def test_mutated_files_end_in_the_error_or_load(tmp_path):
    header = {"a": entry(), "b": entry("I64", (3,), (24, 48))}
    content = write(tmp_path / "w.safetensors", header, FLOATS.tobytes() + bytes(24)).read_bytes()
    for seed in range(500):
        generator = np.random.default_rng(seed)
        changed = bytearray(content[: generator.integers(len(content))] if generator.random() < 0.2 else content)
        for _ in range(generator.integers(1, 4)):
            if changed:
                changed[generator.integers(len(changed))] ^= 1 << generator.integers(8)
        (tmp_path / "w.safetensors").write_bytes(changed)
        started = time.perf_counter()
        with contextlib.suppress(CheckpointFormatError):
            assert sum(array.nbytes for array in load_safetensors(tmp_path / "w.safetensors").values()) <= 96, seed
        assert time.perf_counter() - started < 20
