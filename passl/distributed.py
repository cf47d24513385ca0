"""The only door to ``paddle.distributed``: every function is a correct no-op on one process."""

from __future__ import annotations

import contextlib
from typing import Any, Callable

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.utils import recompute as paddle_recompute


def rank() -> int:
    """Index of this process among all processes of the job, 0 on one process."""
    return dist.get_rank()


def world_size() -> int:
    """Number of processes of the job."""
    return dist.get_world_size()


def is_main() -> bool:
    """True on the one process that writes files and logs."""
    return rank() == 0


def init() -> None:
    """Join the job that ``python -m paddle.distributed.launch`` started; nothing to do without it."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_parallel_env()


def data_parallel(layer: paddle.nn.Layer) -> paddle.nn.Layer:
    """``layer`` whose backward averages the gradients over processes; ``layer`` itself on one process.

    Gradients are exchanged in groups while the rest of the backward still runs. Parameters must have their final ``stop_gradient`` by now: one that is unfrozen later would silently stay local.
    """
    return paddle.DataParallel(layer) if world_size() > 1 else layer


def synchronised(layer: paddle.nn.Layer, now: bool) -> contextlib.AbstractContextManager[None]:
    """A context for one backward: ``now=False`` keeps gradients local (all but the last micro-batch of an
    accumulation).
    """
    if isinstance(layer, paddle.DataParallel) and not now:
        return layer.no_sync()
    return contextlib.nullcontext()


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of whose inner results nothing is kept: backward calls ``function`` a second time.

    ``function`` has to do the same both times; see :mod:`passl.engine.recompute` for what that takes. Paddle's other
    implementation (``use_reentrant=True``) runs a backward of its own for each call, so that the hooks of DataParallel
    meet the gradient of a layer that is called twice (crops of two sizes) before it is complete. This one cannot keep
    the state of the random generator on the CPU of Paddle 2.6, which the caller therefore does.
    """
    return paddle_recompute(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def broadcast_(tensor: paddle.Tensor, source: int) -> paddle.Tensor:
    """Overwrite ``tensor`` (of one shape and type everywhere) with that of the process ``source``."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def all_reduce_sum_(tensor: paddle.Tensor) -> paddle.Tensor:
    """Sum ``tensor`` (contiguous, float32 or float64: half precision overflows) over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather(tensor: paddle.Tensor) -> paddle.Tensor:
    """``tensor`` (of one shape and type everywhere) of every process, in order of rank: [world_size, ...]."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    tensors: list[paddle.Tensor] = []
    dist.all_gather(tensors, tensor)
    return paddle.stack(tensors)


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Concatenate ``rows`` [n, ...] (n may differ) of all processes, in order of rank, on every process."""
    if world_size() == 1:
        return rows
    counts: list[int] = gather_objects(len(rows))
    padded = np.zeros((max(counts), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, paddle.to_tensor(padded))
    return np.concatenate([part.numpy()[:count] for part, count in zip(gathered, counts)])


def gather_objects(value: Any) -> list:
    """The (small, picklable) ``value`` of every process, in order of rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = []
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The first process's (small, picklable) ``value``, on every process; what the others give is ignored."""
    return gather_objects(value)[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
