"""The projection head against recorded values of the official code."""

import json
import re

import numpy as np
import paddle
import pytest

from passl.models import DINOHead
from passl.models.layers import learned_parameters
from tests.models.weights import assert_close, load, to_torch, torch_name


def recorded_cases(recorded) -> dict:
    """case -> {key without the case: array}"""
    cases: dict = {}
    for key in recorded.files:
        if key.startswith("head/"):
            _, case, rest = key.split("/", 2)
            cases.setdefault(case, {})[rest] = recorded[key]
    return cases


def head_like(case: dict) -> DINOHead:
    """The head whose state dict is the recorded one."""
    state = {key[len("sd/") :]: value for key, value in case.items() if key.startswith("sd/")}
    weights = [value for key, value in state.items() if re.fullmatch(r"mlp\.(\d+\.)?weight", key) and value.ndim == 2]
    trainable_gain = "grad/last_layer.weight_g" in case
    out_dim, bottleneck_dim = state["last_layer.weight_v"].shape
    head = DINOHead(
        in_dim=weights[0].shape[1],
        out_dim=out_dim,
        use_bn=any("running_mean" in key for key in state),
        norm_last_layer=not trainable_gain,
        num_layers=len(weights),
        hidden_dim=weights[0].shape[0],
        bottleneck_dim=bottleneck_dim,
    )
    load(head, state)
    return head


@pytest.mark.smoke
def test_outputs_gradients_and_buffers(reference, float64):
    cases = recorded_cases(np.load(reference / "units.npz"))
    assert cases
    for name, case in cases.items():
        head = head_like(case)
        x = paddle.to_tensor(case["x"].astype("float64"), stop_gradient=False)
        head.eval()
        assert_close(head(x).detach(), case["out_eval"], 1e-10, f"{name} eval")
        head.train()
        output = head(x)
        assert_close(output.detach(), case["out_train"], 1e-10, f"{name} train")
        (output * paddle.to_tensor(case["cotangent"].astype("float64"))).sum().backward()
        assert_close(x.grad, case["grad_x"], 1e-10, f"{name} grad_x")
        for parameter_name, parameter in head.named_parameters():
            key = f"grad/{parameter_name}"
            assert (parameter.grad is not None) == (key in case), f"{name} {key}"
            if key in case:
                assert_close(to_torch(parameter_name, parameter.grad), case[key], 1e-10, f"{name} {key}")
        ours = {f"buffer_after_one_train_forward/{torch_name(n)}": value for n, value in head.state_dict().items()}
        for key in [key for key in case if key.startswith("buffer") and not key.endswith("num_batches_tracked")]:
            assert_close(ours[key], case[key], 1e-10, f"{name} {key}")


def test_trainable_parameters(reference):
    recorded = np.load(reference / "units.npz")
    for name, case in recorded_cases(recorded).items():
        ours = sorted(not parameter.stop_gradient for parameter in learned_parameters(head_like(case)))
        assert ours == sorted(case["requires_grad"].tolist()), name


def test_names_and_shapes(reference):
    path = reference / "names_shapes.json"
    if not path.exists():
        pytest.skip("this recording has no names_shapes.json")
    heads = {tag: entries for tag, entries in json.loads(path.read_text()).items() if "head" in tag.lower()}
    assert heads
    for tag, entries in heads.items():
        shapes = dict(map(tuple, ((name, tuple(shape)) for name, shape in entries)))
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
        out_dim, bottleneck_dim = shapes["last_layer.weight_v"]
        hidden_dim, in_dim = shapes["mlp.0.weight"]
        use_bn = any("running" in name for name in shapes)
        head = DINOHead(in_dim, out_dim, use_bn, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        ours = {torch_name(n): to_torch(n, np.empty(p.shape, bool)).shape for n, p in head.state_dict().items()}
        assert ours == shapes, tag


def test_a_zero_feature_has_a_finite_gradient():
    head = DINOHead(4, 8, hidden_dim=6, bottleneck_dim=5, num_layers=1)
    x = paddle.zeros([2, 4])
    x.stop_gradient = False
    head(x).sum().backward()
    assert np.isfinite(x.grad.numpy()).all()


def test_wrong_arguments():
    for name in ("out_dim", "num_layers", "hidden_dim", "bottleneck_dim"):
        with pytest.raises(ValueError, match=rf"{name} \(0\) must be at least 1"):
            DINOHead(4, **{name: 0})
    with pytest.raises(ValueError, match="batch norm needs at least 2 values per channel in training, got 1"):
        DINOHead(4, 8, use_bn=True)(paddle.zeros([1, 4]))
