"""Files for PyTorch: what the reader, which is tested on PyTorch's own files, finds in them."""

from __future__ import annotations

import argparse
import io
import json
import pickletools
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from passl.convert import BFLOAT16, load_torch, save_torch
from passl.formats.storage import MappedFile
from passl.formats.zip_members import zip_members
from tests.convert.contents import arrays_of_all_kinds, assert_same

pytestmark = pytest.mark.smoke

# The operations that torch.load(weights_only=True) knows (torch/_weights_only_unpickler.py), and that are written here.
WEIGHTS_ONLY = (
    "PROTO GLOBAL EMPTY_DICT EMPTY_LIST EMPTY_TUPLE MARK SETITEMS APPENDS TUPLE REDUCE BINPERSID BINUNICODE "
    "BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE STOP"
)


def round_trip(value, tmp_path):
    save_torch(value, tmp_path / "w.pth")
    return load_torch(tmp_path / "w.pth", bfloat16="bits")


def test_arrays_of_all_kinds_to_the_bit(tmp_path):
    arrays = {**arrays_of_all_kinds(), "complex64": np.array([1 + 2j], np.complex64), "complex128": np.array(3j)}
    state = OrderedDict(arrays)
    assert_same(round_trip(state, tmp_path), state)


def test_plain_data_come_back_as_they_are(tmp_path):
    value = {
        "numbers": [0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**70), 2**2000],
        "floats": (0.1, -0.0, float("inf"), float("nan")),
        "flags": [True, False, None],
        "text": {"": "", "é\n\0": "\U0001f600", "long": "x" * 70_000, "surrogate": "\ud800"},
        "empty": [[], (), {}, OrderedDict(), argparse.Namespace()],
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, local_crops_scale=[0.05, 0.4], nested={"a": None}),
        3: OrderedDict([((1, "a"), np.zeros(2)), (None, (np.ones(1),))]),
    }
    assert_same(round_trip(value, tmp_path), value)


def test_numpy_scalars_become_python_numbers(tmp_path):
    value = [np.float32(0.5), np.float64(0.1), np.int64(-3), np.bool_(True), np.str_("a")]
    assert_same(round_trip(value, tmp_path), [0.5, 0.1, -3, True, "a"])


def test_recorded_checkpoints_survive(reference, tmp_path):
    for case in json.loads((reference / "full_checkpoint_contents.json").read_text()).values():
        for name in case["files"]:
            checkpoint = load_torch(reference / name)
            for group in checkpoint["optimizer"]["param_groups"]:  # the official code puts numpy's numbers there
                group.update({key: item.item() for key, item in group.items() if isinstance(item, np.generic)})
            assert_same(round_trip(checkpoint, tmp_path), checkpoint)


def test_one_array_used_twice_is_stored_once(tmp_path):
    array = np.arange(1000, dtype=np.float32)
    found = round_trip({"a": array, "b": [array], "c": array.copy()}, tmp_path)
    assert found["a"] is found["b"][0]
    stored = [name for name in zipfile.ZipFile(tmp_path / "w.pth").namelist() if "/data/" in name]
    assert stored == ["archive/data/0", "archive/data/1"]


def test_the_archive_is_one_of_pytorch(tmp_path):
    save_torch(arrays_of_all_kinds(), tmp_path / "w.pth")
    archive = zipfile.ZipFile(tmp_path / "w.pth")
    assert archive.testzip() is None
    assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    assert archive.read("archive/version") == b"3\n"
    assert archive.read("archive/byteorder") == b"little"
    with MappedFile(tmp_path / "w.pth") as file:
        assert {member.start % 64 for member in zip_members(file).values()} == {0}


def test_weights_take_only_operations_that_a_careful_reader_knows(tmp_path):
    plain = {"integers": [3, 300, 70_000, 2**40], "loss": 0.5, "none": None, "flags": [True, False], "empty": ()}
    save_torch({"model": OrderedDict(arrays_of_all_kinds()), **plain}, tmp_path / "w.pth")
    pickled = zipfile.ZipFile(tmp_path / "w.pth").read("archive/data.pkl")
    operations = list(pickletools.genops(io.BytesIO(pickled)))
    assert {operation.name for operation, *_ in operations} == set(WEIGHTS_ONLY.split())
    named = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    assert {name for name in named if not name.endswith("Storage")} == {
        "torch._utils _rebuild_tensor_v2",
        "collections OrderedDict",
    }


def test_bfloat16_takes_no_memory_and_keeps_its_bits(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)  # all there are
    found = round_trip({"w": bits.view(BFLOAT16)}, tmp_path)["w"]
    assert found.dtype == BFLOAT16
    assert not found.flags.owndata
    assert not found.flags.writeable
    np.testing.assert_array_equal(found["bfloat16"], bits)
    wide = load_torch(tmp_path / "w.pth")["w"]
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)


def test_recorded_bfloat16_as_bits(reference):
    for name in ("loader_edge.pth", "loader_edge_legacy.pth", "loader_edge_protocol4.pth"):
        wide = load_torch(reference / name)["teacher"]["bfloat16"]
        bits = load_torch(reference / name, bfloat16="bits")["teacher"]["bfloat16"]
        assert bits.dtype == BFLOAT16
        np.testing.assert_array_equal(bits["bfloat16"], wide.view(np.uint32) >> 16)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"value\['a'\]\[1\] is a set, which the file cannot hold"),
        ({"args": argparse.Namespace(dtype=np.dtype("f4"))}, r"value\['args'\]\['dtype'\] is a "),
        ({"a": b"bytes"}, r"value\['a'\] is a bytes"),
        ([print], r"value\[0\] is a builtin_function_or_method"),
        (1j, "value is a complex"),
        ({"a": np.zeros(2, np.uint16)}, r"value\['a'\] has numbers of type uint16, must be one of float64, .*bool"),
    ],
)
def test_what_has_no_place_is_refused_by_its_place(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        save_torch(value, tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())


def test_a_list_in_itself_is_refused(tmp_path):
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested deeper than 100, or contains itself"):
        save_torch({"a": endless}, tmp_path / "w.pth")
