"""Optimizer state shared out over processes (ZeRO stage 1, Rajbhandari et al. 2020).

Not by Paddle, whose ``group_sharded_parallel`` (3.3.1) asserts a GPU, keeps no checkpoint that another number of
processes could read, and drives Paddle's optimizers only (Momentum and LARS here are not). Nor by its
``DygraphShardingOptimizer``, which refuses parameter groups, which weight decay needs, and turns a missing gradient
into zeros, which would move the moments of a frozen layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import paddle

from passl import distributed
from passl.engine.optim import MASTERS, WRITER, Optimizer, ParamGroup

logger = logging.getLogger("passl")

PIECE = 64 * 2**20  # bytes that are sent at once


class ShardedOptimizer(Optimizer):
    """An optimizer each process of which keeps the moments of its own share of the parameters.

    Every process has all (averaged) gradients and clips them; it updates its share, and sends it to the others. The
    steps are those of the optimizer within, to the last bit, and so is the checkpoint. ``step`` and ``state_dict`` are
    collective: all processes must call them.

    Args:
        build: makes the optimizer within from parameter groups.
        groups: those of the method, the same on every process.

    Raises:
        ValueError: there are more processes than parameters.
    """

    is_shared = True

    def __init__(self, build: Callable[[Sequence[ParamGroup]], Optimizer], groups: Sequence[ParamGroup]) -> None:
        self._owned = shares(groups, distributed.world_size())
        own = {id(parameter) for parameter in self._owned[distributed.rank()]}
        self.inner = build([{**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups])
        super().__init__(groups, self.inner.weight_decay, self.inner.clip_norm, self.inner.clip_mode)
        sizes = [sum(parameter.size for parameter in owned) for owned in self._owned]
        logger.info(
            "sharding: each of %d processes keeps the optimizer state of %.2f to %.2f of %.2f M parameters",
            len(sizes), min(sizes) / 1e6, max(sizes) / 1e6, sum(sizes) / 1e6,
        )  # fmt: skip

    @property
    def kind(self) -> str:
        return self.inner.kind

    def set(self, learning_rate: float, weight_decay: Optional[float] = None) -> None:
        super().set(learning_rate, weight_decay)
        self.inner.set(learning_rate, weight_decay)

    @paddle.no_grad()
    def step(self) -> None:
        self.inner.step()
        for owner, parameters in enumerate(self._owned):
            for piece in _pieces(parameters, [p.size * p.element_size() for p in parameters], _types(parameters)):
                self._send(owner, piece)

    def _send(self, owner: int, parameters: Sequence[paddle.Tensor]) -> None:
        """Give all processes the values that ``parameters``, of one type, have on their owner."""
        is_own = owner == distributed.rank()
        sizes = [parameter.size for parameter in parameters]
        if is_own:
            flat = paddle.concat([parameter.reshape([-1]) for parameter in parameters])
        else:
            flat = paddle.empty([sum(sizes)], parameters[0].dtype)
        distributed.broadcast_(flat, owner)
        if not is_own:
            for parameter, values in zip(parameters, flat.split(sizes)):
                parameter.copy_(values.reshape(parameter.shape), True)

    def state_dict(self) -> dict[str, Any]:
        """On the first process the state of all, in memory of the CPU, as one process would give it; elsewhere the
        share of this process.
        """
        own = self.inner.state_dict()
        entries = list(_entries(own))
        plans = distributed.gather_objects([plan for plan, _ in entries])
        state: dict[str, Any] = {WRITER: own[WRITER]}
        for owner, plan in enumerate(plans):
            values = [value for _, value in entries] if owner == distributed.rank() else None
            for entry, value in _gathered(owner, plan, values):
                table = state.setdefault(entry.table, {}) if entry.table else state
                table[entry.key] = value
        return state if distributed.is_main() else own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        entries = self._checked(state)
        own: dict[str, Any] = {WRITER: self.kind}
        names = [parameter.name for parameter in self.inner.parameters]
        for name in names:
            own.update((key, entries[key]) for layout in self._layouts(name) for key in layout if key in entries)
        if MASTERS in entries:  # also where none of this share's has stepped: it tells that others have
            own[MASTERS] = {name: entries[MASTERS][name] for name in names if name in entries[MASTERS]}
        self.inner.load_state_dict(own)

    def _layouts(self, name: str) -> tuple[set[str], set[str]]:
        return self.inner._layouts(name)


def shares(groups: Sequence[ParamGroup], count: int) -> list[list[paddle.Tensor]]:
    """The parameters of ``groups`` in ``count`` lists of about the same size: the largest first, each to the smallest
    list.

    Raises:
        ValueError: there are not enough of them.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if len(parameters) < count:
        raise ValueError(f"{len(parameters)} parameters cannot be shared by {count} processes: remove sharding")
    lists: list[list[paddle.Tensor]] = [[] for _ in range(count)]
    sizes = [0] * count
    for parameter in sorted(parameters, key=lambda p: -p.size):
        smallest = sizes.index(min(sizes))
        lists[smallest].append(parameter)
        sizes[smallest] += parameter.size
    return lists


class _Entry(NamedTuple):
    """What all have to know of an entry of a state: its table ("": the state itself) and the tensor under its key."""

    table: str
    key: str
    name: str
    shape: list
    dtype: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def _entries(state: Mapping[str, Any], table: str = "") -> Iterator[tuple[_Entry, paddle.Tensor]]:
    for key, value in sorted(state.items()):
        if isinstance(value, Mapping):
            yield from _entries(value, key)
        elif key != WRITER:
            yield _Entry(table, key, value.name, value.shape, str(value.dtype).rpartition(".")[2]), value


def _gathered(
    owner: int, plan: Sequence[_Entry], tensors: Optional[Sequence[paddle.Tensor]]
) -> Iterator[tuple[_Entry, paddle.Tensor]]:
    """The entries of ``plan``, for the process that keeps them: the first. ``tensors``: those of the owner."""
    numbers = list(range(len(plan)))
    bytes_each = [entry.size * np.dtype(entry.dtype).itemsize for entry in plan]
    for piece in _pieces(numbers, bytes_each, [entry.dtype for entry in plan]):
        sizes = [plan[number].size for number in piece]
        if tensors is None:
            flat = paddle.empty([sum(sizes)], plan[piece[0]].dtype)
        else:
            # Through numpy: powers of beta are on the CPU, moments on the GPU.
            flat = paddle.to_tensor(np.concatenate([tensors[number].numpy().ravel() for number in piece]))
        distributed.broadcast_(flat, owner)
        if not distributed.is_main():
            continue
        for number, part in zip(piece, np.split(flat.numpy(), np.cumsum(sizes)[:-1])):
            tensor = paddle.to_tensor(part.reshape(plan[number].shape), place=paddle.CPUPlace())
            tensor.name = plan[number].name
            yield plan[number], tensor


def _pieces(items: Sequence[Any], sizes: Sequence[int], types: Sequence[Any]) -> Iterator[list[Any]]:
    """``items`` in runs of one type and at most PIECE bytes, but of one item at least."""
    piece: list[Any] = []
    total, kind = 0, None
    for item, size, item_kind in zip(items, sizes, types):
        if piece and (item_kind != kind or total + size > PIECE):
            yield piece
            piece, total = [], 0
        piece.append(item)
        total, kind = total + size, item_kind
    if piece:
        yield piece


def _types(tensors: Sequence[paddle.Tensor]) -> list[Any]:
    return [tensor.dtype for tensor in tensors]
