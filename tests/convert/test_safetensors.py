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

from passl.convert import BFLOAT16, CheckpointFormatError, load_safetensors, load_torch, save_safetensors
from tests.convert.contents import arrays_of_all_kinds, assert_same

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


def test_bfloat16_as_its_bits_is_a_view(tmp_path):
    bits = np.arange(6, dtype=np.uint16)
    header = {"w": entry("BF16", (2, 3), (0, 12))}
    path = write(tmp_path / "w.safetensors", json.dumps(header).encode().ljust(64), bits.tobytes())
    for found in (load_safetensors(path, bfloat16="bits"), load_torch(path, bfloat16="bits")):
        assert found["w"].dtype == BFLOAT16
        assert not found["w"].flags.owndata
        np.testing.assert_array_equal(found["w"]["bfloat16"], bits.reshape(2, 3))


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


# --- writing ---


def test_what_is_written_is_read(tmp_path):
    arrays = {
        **arrays_of_all_kinds(),
        "u16": np.arange(3, dtype=np.uint16),
        "u64": np.array(2**63, np.uint64),
        "é": FLOATS,
    }
    save_safetensors(arrays, tmp_path / "w.safetensors", {"format": "pt"})
    found = load_safetensors(tmp_path / "w.safetensors", bfloat16="bits")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert_same(found[name], array, name)


def test_written_as_the_official_library_does(tmp_path):
    state = {"b": np.zeros(3, np.bool_), "w": FLOATS, "a": FLOATS, "n": np.array(5), "h": np.ones(1, np.float16)}
    save_safetensors(state, tmp_path / "w.safetensors", {"format": "pt"})
    header = (  # of safetensors 0.8.0 for this state
        '{"__metadata__":{"format":"pt"},"n":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        '"a":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[32,56]},'
        '"h":{"dtype":"F16","shape":[1],"data_offsets":[56,58]},"b":{"dtype":"BOOL","shape":[3],"data_offsets":[58,61]}}'
    )
    content = (tmp_path / "w.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    assert size % 8 == 0
    assert content[8 : 8 + size].decode().rstrip(" ") == header
    assert content[8 + size :] == b"".join(state[name].tobytes() for name in "nawhb")


def test_the_order_of_a_state_makes_no_difference(tmp_path):
    arrays = arrays_of_all_kinds()
    save_safetensors(arrays, tmp_path / "a", {"a": "1", "b": "2"})
    save_safetensors(dict(reversed(arrays.items())), tmp_path / "b", {"b": "2", "a": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_table(tmp_path):
    save_safetensors({}, tmp_path / "w.safetensors")
    assert load_safetensors(tmp_path / "w.safetensors") == {}


@pytest.mark.parametrize(
    ("state", "metadata", "message"),
    [
        ({"student": {"w": FLOATS}}, None, "'student' is a dict: .* one flat table .* save_torch"),
        ({"epoch": 3}, None, "'epoch' is a int"),
        ({3: FLOATS}, None, "a name .* must be text, .*: 3"),
        ({"__metadata__": FLOATS}, None, "not '__metadata__'"),
        ({"w": np.zeros(2, np.complex64)}, None, "'w' has numbers of type complex64, must be one of uint64, .*bool"),
        ({"w": FLOATS}, {"epoch": 3}, r"metadata \({'epoch': 3}\) .* must be text -> text"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, state, metadata, message):
    with pytest.raises(ValueError, match=message):
        save_safetensors(state, tmp_path / "w.safetensors", metadata)
    assert not list(tmp_path.iterdir())
