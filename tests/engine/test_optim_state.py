"""What an optimizer takes back of what was saved, and what it refuses."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.checkpoint import CheckpointError
from passl.engine.optim import LARS, AdamW, Momentum

OPTIMIZERS = [AdamW, Momentum, LARS]
NAMES = ("mlp.weight", "mlp.weight_b", "last.weight")  # one name begins as another


def make(kind):
    paddle.seed(1)
    parameters = [paddle.create_parameter([2, 3], "float32") for _ in NAMES]
    for name, parameter in zip(NAMES, parameters):
        parameter.name = name
    optimizer = kind([{"params": parameters, "weight_decay": 1.0}])
    optimizer.set(0.1)
    return optimizer


def step(optimizer, names=NAMES):
    sum((p * p).sum() for p in optimizer.parameters if p.name in names).backward()
    optimizer.step()
    optimizer.clear_grad()


def saved(optimizer, folder):
    checkpoint.write(optimizer.state_dict(), folder / "w.pdopt")
    return checkpoint.read(folder / "w.pdopt")


def resumed(optimizer, folder):
    """Another optimizer with the weights and the state of ``optimizer``, through a file."""
    other = make(type(optimizer))
    for target, source in zip(other.parameters, optimizer.parameters):
        target.set_value(source.numpy())
    other.load_state_dict(saved(optimizer, folder))
    return other


def assert_same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key
    for left, right in zip(one.parameters, other.parameters):
        assert (left.numpy() == right.numpy()).all()


@pytest.mark.smoke
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_layer_may_start_later(kind, tmp_path):
    """Nothing is saved of it before, also where the run is resumed more than once."""
    one = make(kind)
    step(one, NAMES[:2])
    other = resumed(resumed(one, tmp_path), tmp_path)
    assert not [key for key in other.state_dict() if key.startswith("last")]
    assert_same(one, other)
    for _ in range(2):
        step(one)
        step(other)
        assert_same(one, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_layer_that_rests_after_resuming_keeps_its_state(kind, tmp_path):
    one = make(kind)
    step(one)
    other = resumed(one, tmp_path)
    for optimizer in (one, other):
        step(optimizer, NAMES[:2])
    assert_same(one, other)
    other = resumed(other, tmp_path)
    for optimizer in (one, other):
        step(optimizer)
    assert_same(one, other)


@pytest.mark.parametrize("says_so", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("writer", OPTIMIZERS)
def test_the_state_of_another_optimizer(kind, writer, says_so, tmp_path):
    source, target = make(writer), make(kind)
    step(source)
    state = saved(source, tmp_path)
    assert state["optimizer"] == writer.__name__
    if not says_so:  # a file of an earlier version
        del state["optimizer"]
    related = kind is writer or (not says_so and AdamW not in (kind, writer))
    if related:
        target.load_state_dict(state)
        return
    who = writer.__name__ if says_so or writer is AdamW else "Momentum or LARS"
    expected = f"was saved by {who}, this is {kind.__name__}: use the same Optimizer, or start anew with -o"
    with pytest.raises(CheckpointError, match=expected):
        target.load_state_dict(state)
    assert not [key for key in target.state_dict() if key != "optimizer"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "mlp.bias_moment1_0": state[min(state)]}, "no trainable parameter.*: mlp.bias_moment"),
        (lambda state: {**state, 7: state[min(state)]}, "no trainable parameter.*: 7"),
        (lambda state: {**state, min(state): np.ones(7, np.float32)}, "shape of their parameter: last.weight_"),
        (lambda state: {**state, min(state): np.array("x")}, "no numbers .*: last.weight_"),
        (lambda state: {}, "holds no entry of any optimizer"),
        (lambda state: [], "is no mapping of names, but list"),
        (lambda state: {**state, "master_weights": 1}, "master_weights .* is no mapping"),
        (lambda state: {**state, "master_weights": {"x": np.ones(1)}}, "no trainable parameter.*: x_fp32_master_0"),
    ],
)
def test_entries_that_do_not_fit(kind, change, message, tmp_path):
    source, target = make(kind), make(kind)
    step(source)
    with pytest.raises(CheckpointError, match=message):
        target.load_state_dict(change(saved(source, tmp_path)))


@pytest.mark.parametrize("suffix", ["_moment1_0", "_moment2_0", "_beta1_pow_acc_0", "_beta2_pow_acc_0"])
def test_a_parameter_has_all_of_its_entries_or_none(suffix, tmp_path):
    source = make(AdamW)
    step(source)
    state = saved(source, tmp_path)
    del state[f"mlp.weight{suffix}"]
    with pytest.raises(CheckpointError, match=f"lacks some entries .*: mlp.weight{suffix}$"):
        make(AdamW).load_state_dict(state)


def test_half_precision_entries_need_their_masters():
    entries = {f"mlp.weight_fp32_master_0_moment{n}_0": np.ones((2, 3), np.float32) for n in (1, 2)}
    entries.update((f"mlp.weight_fp32_master_0_beta{n}_pow_acc_0", np.ones(1, np.float32)) for n in (1, 2))
    with pytest.raises(CheckpointError, match="lacks some entries .*: mlp.weight_fp32_master_0$"):
        make(AdamW).load_state_dict(entries)
    optimizer = make(AdamW)
    optimizer.load_state_dict({**entries, "master_weights": {"mlp.weight": np.ones((2, 3), np.float32)}})
    assert set(optimizer.state_dict()) == {*entries, "master_weights", "optimizer"}


def test_only_the_first_of_many_keys_are_listed(tmp_path):
    source = make(Momentum)
    step(source)
    extra = {f"gone.{number:02}_velocity_0": np.ones(1, np.float32) for number in range(25)}
    with pytest.raises(CheckpointError, match=r"gone\.19_velocity_0 \.\.\. and 5 more$"):
        make(Momentum).load_state_dict({**saved(source, tmp_path), **extra})
