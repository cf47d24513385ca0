"""PyTorch's files: everything that the recorded ones hold, to the bit."""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from passl.convert import CheckpointFormatError, load_torch
from tests.convert.writer import Call, Named, Raw, Storage, tensor, view, write_legacy, write_zip

pytestmark = pytest.mark.smoke

EDGE_FILES = ("loader_edge.pth", "loader_edge_legacy.pth", "loader_edge_protocol4.pth")
FLOATS = np.arange(12, dtype=np.float32).reshape(3, 4)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """What is in nested dicts, lists, tuples and namespaces, by path."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path[1:]: value}
    return {name: leaf for key, item in value.items() for name, leaf in leaves(item, f"{path}/{key}").items()}


def load_and_measure(path: Path) -> tuple[Any, int]:
    """The content of a file, and the memory that reading it took at most."""
    tracemalloc.start()
    try:
        return load_torch(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(params=["zip", "legacy"])
def write(request):
    return {"zip": write_zip, "legacy": write_legacy}[request.param]


# --- the recorded files ---


def test_full_checkpoints_to_the_bit(reference):
    for case in json.loads((reference / "full_checkpoint_contents.json").read_text()).values():
        for name in case["files"]:
            checkpoint = load_torch(reference / name)
            assert list(checkpoint) == case["top_level_keys"]
            assert list(checkpoint["student"]) == case["student_keys"]
            assert list(checkpoint["teacher"]) == case["teacher_keys"]
            assert type(checkpoint["args"]) is argparse.Namespace
            is_copy = "_asgpu" in name  # its optimizer is written as by an older PyTorch
            check_contents(name, checkpoint, case["contents"], is_copy)


def check_contents(name: str, checkpoint: dict, contents: dict, is_copy: bool) -> None:
    found = leaves(checkpoint)
    for path, expected in contents.items():
        if is_copy and path not in found and path.startswith("optimizer/param_groups"):
            continue
        value = value_at(checkpoint, path)
        if expected["kind"] != "tensor":
            if is_copy and path.endswith("/step"):
                continue
            assert f"{type(value).__module__}.{type(value).__name__}" == expected["kind"], (name, path)
            assert plain_repr(repr(value)) == plain_repr(expected["repr"]), (name, path)
        elif not (is_copy and path.endswith("/step")):
            assert f"torch.{value.dtype}" == expected["dtype"], (name, path)
            assert list(value.shape) == expected["shape"], (name, path)
            assert value.flags.c_contiguous
            assert not value.flags.writeable
            assert hashlib.sha256(value.tobytes()).hexdigest() == expected["sha256"], (name, path)


def plain_repr(text: str) -> str:
    """`text` as numpy 1 writes it, which leaves out the type of a scalar."""
    return re.sub(r"np\.\w+\((.*)\)", r"\1", text)


def value_at(value: Any, path: str) -> Any:
    for key in path.split("/"):
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        value = value[int(key)] if isinstance(value, (list, tuple)) or key not in value else value[key]
    return value


@pytest.mark.parametrize("name", EDGE_FILES)
def test_edge_cases_to_the_bit(reference, name):
    found = load_torch(reference / name)
    arrays = {**found["teacher"], **leaves({key: found[key] for key in ("nested", "np_array", "np_array_f")})}
    with np.load(reference / "loader_edge_expected.npz") as expected:
        for path in expected.files:
            value = arrays[path]
            assert value.dtype == expected[path].dtype, path
            assert value.shape == expected[path].shape, path
            assert value.tobytes() == expected[path].tobytes(), path
            assert value.flags.c_contiguous or path == "np_array_f", path
    assert isinstance(found["teacher"], OrderedDict)
    assert found["nested"]["ints"][2] == 2**70
    assert found["nested"]["bytes"] == b"\x00\xff"
    assert found["nested"]["uni"] == "café 日本"
    assert found["np_scalar"].dtype == np.float64
    assert found["np_int64"].dtype == np.int64
    assert found["np_bool"] == np.True_
    assert isinstance(found["args"].sub, argparse.Namespace)
    assert isinstance(found["set"], set)
    assert isinstance(found["size"], tuple)
    assert (found["dtype"], found["device"]) == ("torch.float32", "cpu")


def test_every_recorded_file_loads(reference):
    files = [path for pattern in ("*.pth", "*.pt", "*.pth.tar") for path in sorted(reference.glob(pattern))]
    assert len(files) > 5
    for path in files:
        found = leaves(load_torch(path))
        assert any(isinstance(leaf, np.ndarray) for leaf in found.values()), path


# --- what else is in such files ---


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    numbers = np.zeros((4 << 20,), np.float32)
    path = write_zip(tmp_path / "large.pth", {"w": tensor(numbers)})
    found, peak = load_and_measure(path)
    assert peak < numbers.nbytes / 8
    array = found["w"]
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert isinstance(array.base, (mmap.mmap, memoryview))
    path.unlink()
    assert array.sum() == 0


@pytest.mark.parametrize("shift", ["", "1", "12", "123"])  # only one of these leaves the numbers aligned
def test_memory_of_a_legacy_file_is_that_of_its_weights(tmp_path, shift):
    numbers = np.zeros((4 << 20,), np.float32)
    path = write_legacy(tmp_path / "large.pth", {f"name{shift}": "x", "w": tensor(numbers), "same": tensor(numbers)})
    assert load_and_measure(path)[1] < numbers.nbytes * 1.2


@pytest.mark.parametrize("location", ["cpu", "cuda:0", "cuda:7", "mps"])
def test_location_does_not_matter(tmp_path, write, location):
    storage = Storage("FloatStorage", "0", 12, FLOATS.tobytes(), location)
    np.testing.assert_array_equal(load_torch(write(tmp_path / "w.pth", view(storage, 0, (3, 4), (4, 1)))), FLOATS)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, write, protocol):
    value = {
        "w": tensor(FLOATS),
        "args": argparse.Namespace(lr=np.float64(0.1), path=PurePosixPath("a/b"), eps=1e-8, sizes=[1, -2, 70000]),
        "array": np.asfortranarray(FLOATS),
        "big_endian": FLOATS.astype(">f4"),
        "words": np.array(["ab", "c"]),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "bytes": b"\x00\xff",
        "none": [None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), 2**70, -(2**70), 1j, float("inf")],
    }
    found = load_torch(write(tmp_path / "w.pth", value, protocol))
    np.testing.assert_array_equal(found.pop("w"), FLOATS)
    for name in ("array", "big_endian", "words"):
        np.testing.assert_array_equal(found.pop(name), value[name])
    assert found == {name: value[name] for name in found}
    assert list(found) == ["args", "set", "frozen", "bytes", "none"]


def test_files_of_python_2_and_protocol_0(tmp_path):
    text = Raw(b"(dS'a'\nI01\nsS'b'\nL12345678901234567890L\nsVc\\u00e9\nF1.5\nsU\x01d(lp0\nU\x01xas")
    assert load_torch(write_legacy(tmp_path / "w.pth", text)) == {
        "a": True,
        "b": 12345678901234567890,
        "cé": 1.5,
        "d": ["x"],
    }


def test_tensors_of_bytes_and_tensors_with_attributes(tmp_path):
    storage = Storage("UntypedStorage", "0", 48, FLOATS.tobytes())
    arguments = (storage, 2, (2,), (1,), False, {}, Named("torch", "float32"))
    of_bytes = Call(Named("torch._utils", "_rebuild_tensor_v3"), arguments)
    plain = tensor(FLOATS, key="1")
    kind = Named("torch.nn.parameter", "Parameter")
    attributed = Call(Named("torch._tensor", "_rebuild_from_type_v2"), (*plain[:1], kind, plain[1], {"a": 1}))
    found = load_torch(write_zip(tmp_path / "w.pth", [of_bytes, attributed]))
    np.testing.assert_array_equal(found[0], [2, 3])
    np.testing.assert_array_equal(found[1], FLOATS)


def test_dicts_of_other_classes_are_dicts(tmp_path, write):
    value = {"counter": Counter("aab"), "default": defaultdict(list, a=[1]), "ordered": OrderedDict(a=1)}
    found = load_torch(write(tmp_path / "w.pth", value))
    assert found == value
    assert [type(item) for item in found.values()] == [dict, dict, OrderedDict]


@pytest.mark.parametrize("module", ["pytorch_lightning.utilities.parsing", "lightning.fabric.utilities.data"])
def test_lightning_s_hyper_parameters(tmp_path, write, module):
    hyper_parameters = Call(Named(module, "AttributeDict"), ([("lr", 1.0)],))
    assert load_torch(write(tmp_path / "w.ckpt", {"hyper_parameters": hyper_parameters})) == {
        "hyper_parameters": {"lr": 1.0}
    }


def test_an_archive_without_checksums(tmp_path):
    """torch.save writes zeros for them after set_crc32_options(False)."""
    path = write_zip(tmp_path / "w.pth", tensor(FLOATS))
    content = path.read_bytes()
    for info in zipfile.ZipFile(path).infolist():
        content = content.replace(struct.pack("<L", info.CRC), bytes(4))
    path.write_bytes(content)
    np.testing.assert_array_equal(load_torch(path), FLOATS)


def test_parts_of_storages_of_old_files(tmp_path):
    storage = Storage("FloatStorage", "0", 12, FLOATS.tobytes())
    path = write_legacy(tmp_path / "w.pth", view(storage, 1, (2,), (1,)))
    content = path.read_bytes()
    at = content.index(b"NtQ") if b"NtQ" in content else content.index(b"Nt")
    part = b"(X\x01\x00\x00\x00vK\x04K\x06t"  # 6 numbers from the fifth on
    path.write_bytes(content[:at] + part + content[at + 1 :])
    np.testing.assert_array_equal(load_torch(path), [5, 6])


def test_equal_views_are_one_array(tmp_path):
    storage = Storage("BFloat16Storage", "0", 2, b"\x80\x3f\x00\xc0")
    first, second = load_torch(write_zip(tmp_path / "w.pth", [view(storage, 0, (2,), (1,))] * 2))
    assert first is second
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, [1, -2])


def test_reading_does_not_import_paddle():
    code = "import sys, passl.convert; print('paddle' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointFormatError, match=r"x\.pth: no such file"):
        load_torch(tmp_path / "x.pth")
    with pytest.raises(CheckpointFormatError, match="not a file"):
        load_torch(tmp_path)
