"""Putting recorded PyTorch weights into our layers, and getting ours back in PyTorch's layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import paddle
from paddle import nn

BUFFERS = {"_mean": "running_mean", "_variance": "running_var"}


def torch_name(name: str) -> str:
    """Ours -> PyTorch's: only the buffers of batch norms differ."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{BUFFERS[leaf]}" if leaf in BUFFERS else name


def to_torch(name: str, value) -> np.ndarray:
    """A tensor of ours (or its gradient) in PyTorch's layout; `name` is either side's."""
    value = np.asarray(value)
    if name.endswith("weight_g"):
        return value.reshape(-1, 1)
    return value.T if is_matrix(name, value) else value


def from_torch(name: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    return value.reshape(-1) if name.endswith("weight_g") else value.T if is_matrix(name, value) else value


def is_matrix(name: str, value: np.ndarray) -> bool:
    """Whether it is multiplied with, and so lies the other way round in PyTorch; mask_token [1, D] is a vector."""
    return value.ndim == 2 and not name.endswith("mask_token")


def load(layer: nn.Layer, state: Mapping[str, np.ndarray], prefix: str = "") -> None:
    """Sets every parameter and buffer of `layer` from PyTorch's `state`, where names start with `prefix`."""
    with paddle.no_grad():
        for name, tensor in layer.state_dict().items():
            value = from_torch(name, np.asarray(state[prefix + torch_name(name)]))
            assert list(value.shape) == tensor.shape, (name, value.shape, tensor.shape)
            tensor.set_value(value.astype(tensor.numpy().dtype))


def load_refgen(reference: Path) -> ModuleType:
    """The recordings' own generator of weights and inputs."""
    spec = importlib.util.spec_from_file_location("refgen", reference / "refgen.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated_state(refgen: ModuleType, layer: nn.Layer, salt: str) -> dict[str, np.ndarray]:
    """The weights that the recordings of the full-size models used, in PyTorch's layout."""
    state = {}
    for name, tensor in layer.state_dict().items():
        shape = to_torch(name, np.empty(tensor.shape, np.bool_)).shape
        state[torch_name(name)] = refgen.fill(torch_name(name), shape, salt)
    return state


def assert_close(actual, expected, tolerance: float, what: str = "") -> None:
    """Largest absolute difference within `tolerance`; shapes equal."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    difference = np.abs(actual - expected).max()
    assert difference <= tolerance, f"{what}: differs by {difference:.3g}, allowed {tolerance:.3g}"


def assert_gradients_reach_everything(model, x):
    """After a backward: finite gradients, not all zero, at the input and at every parameter but running statistics."""
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    assert len(trained) == sum(not name.endswith(("_mean", "_variance")) for name in model.state_dict())
    for name, parameter in trained.items():
        assert np.isfinite(parameter.grad.numpy()).all(), name
        assert parameter.grad.abs().max().item() > 0, name
    assert x.grad.abs().max().item() > 0
