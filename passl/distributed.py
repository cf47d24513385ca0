"""The only door to ``paddle.distributed``: every function is a correct no-op on one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Callable

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.utils import recompute as paddle_recompute
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

_IN_PARTS = "gradients_come_in_parts"


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

    Gradients are exchanged in groups while the rest of the backward still runs. Parameters must have their final
    ``stop_gradient`` by now: one that is unfrozen later would silently stay local.
    """
    return paddle.DataParallel(layer) if world_size() > 1 else layer


@contextlib.contextmanager
def synchronised(layer: paddle.nn.Layer, now: bool) -> Iterator[None]:
    """A context for one forward and backward: ``now=False`` keeps gradients local (all but the last micro-batch of an
    accumulation).

    With :func:`recompute` gradients are averaged at the end of the context, not during backward.
    """
    is_parallel = isinstance(layer, paddle.DataParallel)
    in_parts = getattr(layer._layers if is_parallel else layer, _IN_PARTS, False)
    local = layer.no_sync() if is_parallel and (in_parts or not now) else contextlib.nullcontext()
    whole = _added_whole(layer) if in_parts else contextlib.nullcontext()
    with local, whole:
        yield
    if is_parallel and in_parts and now:
        fused_allreduce_gradients(layer.parameters(), None)


@contextlib.contextmanager
def _added_whole(layer: paddle.nn.Layer) -> Iterator[None]:
    """Gradients that come in parts are added up before they join those of earlier micro-batches, as without
    :func:`recompute`: the sum is the same to the last bit.
    """
    earlier = []
    for parameter in layer.parameters():
        if parameter.grad is not None:
            earlier.append((parameter, paddle.assign(parameter.grad)))
            parameter.clear_gradient(False)
    yield
    with paddle.no_grad():
        for parameter, gradient in earlier:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)


def expect_recompute(layer: paddle.nn.Layer) -> None:
    """To be told of ``layer``, the whole of what is trained, before :func:`recompute` is used in it.

    A layer that is called twice (crops of two sizes) then gets its gradient in two parts, and the hooks of DataParallel
    would send the first alone.
    """
    setattr(layer, _IN_PARTS, True)


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of whose inner results nothing is kept: backward calls ``function`` a second time, with
    the random generator as it was. One of ``inputs`` must have a gradient.

    Not Paddle's other implementation (``use_reentrant=False``), which DataParallel would understand: where strided
    views are kept for the backward its gradients are wrong, without a word (3.3.1 and 2.6.2).
    """
    return paddle_recompute(function, *inputs)


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
