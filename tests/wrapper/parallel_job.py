"""A plain loop under paddle.DataParallel; each process writes what it has in the end. Arguments: folder, version."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from passl import DINOWrapper
from tests.wrapper.small import FixedViT, batch, crops, small_conf

IMAGES, STEPS = 8, 4


def share(views: dict[str, Tensor], rank: int, count: int) -> dict[str, Tensor]:
    """The views of the images of one process."""
    parts = {}
    for name, array in views.items():
        by_view = array.reshape([-1, IMAGES, *array.shape[1:]])
        own = by_view[:, rank * IMAGES // count : (rank + 1) * IMAGES // count]
        parts[name] = own.reshape([-1, *array.shape[1:]])
    return parts


def run(version: str, rank: int = 0, count: int = 1) -> dict[str, np.ndarray]:
    """State of the wrapper after the loop, and the losses of this process."""
    paddle.seed(rank)  # the first process's weights count
    # KoLeo looks at the images of one process only.
    settings = {"koleo_loss_weight": 0.0} if version == "v2" else {}
    wrapper = DINOWrapper(FixedViT(dropout=0.0), small_conf(version=version, freeze_last_layer=1, **settings))
    model = paddle.DataParallel(wrapper) if count > 1 else wrapper
    optimizer = paddle.optimizer.Momentum(1e-3, parameters=wrapper.parameters())
    losses = []
    for step in range(STEPS):
        output, loss = model(share(crops(IMAGES, seed=step), rank, count), step // 2)
        (loss + output.square().mean()).backward()
        optimizer.step()
        optimizer.clear_grad()
        wrapper.ema_update(step)
        losses.append(loss.item())
    state = {name: value.numpy() for name, value in wrapper.state_dict().items()}
    _, loss = model(batch(seed=rank))  # with views of its own
    loss.backward()
    return {**state, "losses": np.array(losses), "own": loss.numpy()}


if __name__ == "__main__":
    dist.init_parallel_env()
    np.savez(
        Path(sys.argv[1]) / f"rank{dist.get_rank()}.npz", **run(sys.argv[2], dist.get_rank(), dist.get_world_size())
    )
