"""What `test_distributed.py` starts on two processes: batch norm of unequal shares of one batch.

Each process writes what it got to `FOLDER/RANK.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle

from passl import distributed
from passl.models.layers import BatchNorm1D, BatchNorm2D

SHARES = ([0], [1, 2, 3, 4])  # one of them a single row, which has no variance of its own
SHAPES = {BatchNorm1D: (5, 3), BatchNorm2D: (5, 3, 4, 2)}


def data(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs far from zero, and gradients of the outputs."""
    rng = np.random.default_rng(0)
    return rng.normal(10.0, 3.0, shape), rng.normal(size=shape)


def results(layer_type: type[paddle.nn.Layer], rows: list[int]) -> dict[str, np.ndarray]:
    """Output, gradients and running statistics of a fresh layer after one batch and its backward."""
    layer = layer_type(3)
    with paddle.no_grad():
        layer.weight.set_value(paddle.to_tensor([1.0, 2.0, -1.0]))
    x, gradient = (paddle.to_tensor(array[rows]) for array in data(SHAPES[layer_type]))
    x.stop_gradient = False
    y = layer(x)
    (y * gradient).sum().backward()
    found = {"y": y, "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    found.update(mean=layer._mean, variance=layer._variance)
    return {name: tensor.numpy() for name, tensor in found.items()}


def frozen_and_silent(rank: int) -> None:
    """Gradients stop where they should, and in eval mode one process can do what the other does not."""
    layer = BatchNorm2D(3)
    layer.weight.stop_gradient = True
    x = paddle.to_tensor(data(SHAPES[BatchNorm2D])[0][SHARES[rank]])
    layer(x).sum().backward()
    assert [tensor.grad is None for tensor in (layer.weight, layer.bias, x)] == [True, False, True]
    with paddle.no_grad():
        assert layer(x).stop_gradient
    layer.eval()
    if rank == 0:
        layer(x)


def main() -> None:
    paddle.set_device("cpu")
    paddle.set_default_dtype("float64")
    distributed.init()
    rank = distributed.rank()
    found = {}
    for layer_type in SHAPES:
        found.update((f"{layer_type.__name__}/{k}", v) for k, v in results(layer_type, SHARES[rank]).items())
    frozen_and_silent(rank)
    np.savez(Path(sys.argv[1]) / f"{rank}.npz", **found)


if __name__ == "__main__":
    main()
