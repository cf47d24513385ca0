"""How a Layer's state lies in PyTorch: under which name, in which shape. Read off the Layer itself, for both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Callable, Literal, NamedTuple

import numpy as np
import paddle
from paddle import nn

from passl.models.dino.head import WeightNormLinear

# Batch norms of PyTorch count their steps; nothing reads the count, and Paddle has none.
COUNTER = "num_batches_tracked"
_BUFFERS = {"_mean": "running_mean", "_variance": "running_var"}

Layout = Literal["same", "transposed", "column"]


class Slot(NamedTuple):
    """One tensor of a Layer: its name and shape here, and how PyTorch has it."""

    name: str
    torch_name: str
    shape: tuple[int, ...]
    layout: Layout  # transposed: Linear's weight; column: [K] here is [K, 1] there

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return (*self.shape, 1) if self.layout == "column" else self._turned(self.shape)

    def _turned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if self.layout == "transposed" else shape

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        """PyTorch's array as this Layer has it, a view."""
        return value.reshape(self.shape) if self.layout == "column" else self._view(value)

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """The opposite of :meth:`from_torch`, a view too."""
        return value.reshape(self.torch_shape) if self.layout == "column" else self._view(value)

    def _view(self, value: np.ndarray) -> np.ndarray:
        return value.T if self.layout == "transposed" else value


def slots(layer: nn.Layer) -> list[Slot]:
    """All of the state of ``layer``, in its own order (which is PyTorch's, where the Layer is built like its model)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    owners = dict(layer.named_sublayers(include_self=True))
    return [_slot(name, shape, owners[name.rpartition(".")[0]]) for name, shape in shapes.items()]


def _slot(name: str, shape: tuple[int, ...], owner: nn.Layer) -> Slot:
    stem, dot, leaf = name.rpartition(".")
    layout: Layout = "same"
    if (isinstance(owner, nn.Linear) and leaf == "weight") or (
        isinstance(owner, WeightNormLinear) and leaf == "weight_v"
    ):
        layout = "transposed"
    elif isinstance(owner, WeightNormLinear) and leaf == "weight_g":
        layout = "column"
    return Slot(name, f"{stem}{dot}{_BUFFERS.get(leaf, leaf)}", shape, layout)


def counters(layout: list[Slot]) -> list[str]:
    """PyTorch's names of the counters of all batch norms."""
    tail = "running_var"
    return [slot.torch_name[: -len(tail)] + COUNTER for slot in layout if slot.torch_name.endswith(tail)]


def blueprint(builder: Callable[..., nn.Layer], arguments: Mapping[str, Any]) -> nn.Layer:
    """The Layer that ``builder`` makes, without memory for its parameters: only names and shapes are of use."""
    with paddle.LazyGuard():
        return builder(**arguments)


def prefixed(prefix: str, layout: list[Slot]) -> list[Slot]:
    """The same slots one level further down."""
    return [slot._replace(name=prefix + slot.name, torch_name=prefix + slot.torch_name) for slot in layout]


def size_of(layout: list[Slot]) -> int:
    """Number of values in all slots."""
    return sum(math.prod(slot.shape) for slot in layout)
