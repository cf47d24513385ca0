"""Files for Paddle: what paddle.load and passl's own reader find in them."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.convert import BFLOAT16, save_pdparams
from tests.convert.contents import arrays_of_all_kinds, assert_same

pytestmark = pytest.mark.smoke

FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3)


def as_bits(array: np.ndarray) -> np.ndarray:
    return array["bfloat16"] if array.dtype == BFLOAT16 else array


def check_tensor(tensor: paddle.Tensor, name: str, array: np.ndarray) -> None:
    assert isinstance(tensor, paddle.Tensor), name
    assert tensor.name == name
    kind = "bfloat16" if array.dtype == BFLOAT16 else array.dtype.name
    assert str(tensor.dtype) == f"paddle.{kind}"
    assert list(tensor.shape) == list(array.shape)
    assert tensor.numpy().tobytes() == as_bits(array).tobytes(), name


def test_paddle_loads_a_state_dict(tmp_path):
    arrays = arrays_of_all_kinds()
    save_pdparams(arrays, tmp_path / "w.pdparams")
    found = paddle.load(str(tmp_path / "w.pdparams"))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        check_tensor(found[name], name, array)


def test_paddle_loads_nested_values(tmp_path):
    arrays = arrays_of_all_kinds()
    plain = {"step": 2**40, "lr": 0.1, "name": "é", "none": None, "flag": True, "shapes": [1, (2, "x")], "empty": {}}
    value = {"model": OrderedDict(arrays), "list": [FLOATS, (FLOATS,)], "pair": ("text", FLOATS), **plain}
    save_pdparams(value, tmp_path / "w.pdopt")
    found = paddle.load(str(tmp_path / "w.pdopt"))
    assert list(found) == list(value)
    assert type(found["model"]) is OrderedDict
    for name, array in arrays.items():
        check_tensor(found["model"][name], f"model.{name}", array)
    check_tensor(found["list"][0], "list.0", FLOATS)
    check_tensor(found["list"][1][0], "list.1.0", FLOATS)
    assert found["pair"][0] == "text"
    check_tensor(found["pair"][1], "pair.1", FLOATS)
    assert_same({name: found[name] for name in plain}, plain)


def test_passl_reads_both_forms(tmp_path):
    arrays = arrays_of_all_kinds()
    bits = {name: as_bits(array) for name, array in arrays.items()}
    save_pdparams(arrays, tmp_path / "flat.pdparams")
    assert_same(checkpoint.read(tmp_path / "flat.pdparams"), bits)
    value = {"model": arrays, "epoch": 3, "pair": ("text", FLOATS), "list": [FLOATS], "none": None}
    save_pdparams(value, tmp_path / "nested.pdopt")
    assert_same(checkpoint.read(tmp_path / "nested.pdopt"), {**value, "model": bits})


def test_weights_are_read_with_bfloat16_as_numbers(tmp_path):
    save_pdparams({"w": np.array([0x3FC0, 0xC020], np.uint16).view(BFLOAT16), "v": FLOATS}, tmp_path / "w.pdparams")
    expected = {"w": np.array([1.5, -2.5], np.float32), "v": FLOATS}
    assert_same(checkpoint.read_weights(tmp_path / "w"), expected)


def test_a_state_dict_is_what_paddle_itself_writes(tmp_path):
    layer = paddle.nn.Linear(2, 3)
    state = {**layer.state_dict(), "half": paddle.ones([2]).astype("bfloat16"), "n": paddle.to_tensor(3)}
    for name, tensor in state.items():
        tensor.name = name
    paddle.save(state, str(tmp_path / "paddle.pdparams"), protocol=4)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    arrays["half"] = arrays["half"].view(BFLOAT16)
    save_pdparams(arrays, tmp_path / "passl.pdparams")
    found, expected = (pickle.loads((tmp_path / f"{who}.pdparams").read_bytes()) for who in ("passl", "paddle"))
    assert_same(found, expected)


def test_a_layer_takes_the_state(tmp_path):
    source, target = (paddle.nn.Sequential(paddle.nn.Linear(4, 3), paddle.nn.BatchNorm1D(3)) for _ in range(2))
    weights = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    weights["0.weight"] = np.asfortranarray(weights["0.weight"])
    save_pdparams(weights, tmp_path / "w.pdparams")
    missing, unexpected = target.set_state_dict(paddle.load(str(tmp_path / "w.pdparams")))
    assert not missing
    assert not unexpected
    x = paddle.randn([5, 4])
    np.testing.assert_array_equal(target(x).numpy(), source(x).numpy())


def test_an_empty_state_dict(tmp_path):
    save_pdparams({}, tmp_path / "w.pdopt")
    assert paddle.load(str(tmp_path / "w.pdopt")) == {}
    assert checkpoint.read(tmp_path / "w.pdopt") == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([FLOATS], "a file of Paddle holds a dict .*, not a list"),
        ({"a": 1, "args": argparse.Namespace(lr=1)}, r"value\['args'\] is a Namespace, which the file cannot hold"),
        ({"a": {"b": {1}}}, r"value\['a'\]\['b'\] is a set"),
        ({"a": np.zeros(2, np.uint16)}, r"value\['a'\] has numbers of type uint16, must be one of float64, .*bfloat16"),
        ({"a": FLOATS, "StructuredToParameterName@@": {}}, "'StructuredToParameterName@@' is Paddle's own"),
    ],
)
def test_what_paddle_would_misread_is_refused(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        save_pdparams(value, tmp_path / "w.pdparams")
    assert not list(tmp_path.iterdir())
