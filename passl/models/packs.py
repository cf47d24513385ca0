"""Packs: the tokens of batches of several sizes in one matrix, so that layers over single tokens are called once.

A pack of batches [B_i, T_i, D] is a tensor [sum of B_i * T_i, D] with its sizes, the (B_i, T_i). Only attention, which
keeps within each sequence, has to know them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Optional

import paddle
from paddle import Tensor
from paddle.nn.functional import flash_attention

from passl.models import functional

Sizes = tuple[tuple[int, int], ...]  # (sequences, tokens of each) of every batch


def pack(batches: Sequence[Tensor]) -> tuple[Tensor, Sizes]:
    """[B_i, T_i, D] each -> [sum of B_i * T_i, D] and its sizes"""
    sizes = tuple((batch.shape[0], batch.shape[1]) for batch in batches)
    return concat([batch.flatten(0, 1) for batch in batches]), sizes


def unpack(x: Tensor, sizes: Sizes) -> list[Tensor]:
    """The inverse of `pack`, for any last axes: [sum of B_i * T_i, ...] -> [B_i, T_i, ...] each"""
    parts = split(x, [sequences * tokens for sequences, tokens in sizes])
    return [part.reshape([*size, *x.shape[1:]]) for part, size in zip(parts, sizes)]


def first_tokens(x: Tensor, sizes: Optional[Sizes]) -> tuple[Tensor, Optional[Sizes]]:
    """The first token of each sequence, of a batch [B, T, D] -> [B, 1, D] or a pack -> [sum of B_i, D]."""
    if sizes is None:
        return x[:, :1], None
    firsts = [batch[:, 0] for batch in unpack(x, sizes)]
    return concat(firsts), tuple((sequences, 1) for sequences, _ in sizes)


def attention(query: Tensor, key: Tensor, value: Tensor, query_sizes: Sizes, sizes: Sizes) -> Tensor:
    """Block-diagonal: each query attends to its own sequence. Packs [rows, heads, d] -> as the queries.

    query_sizes: those of the queries; sizes: of keys and values, as many sequences.
    """
    if functional.has_flash_attention(query):
        return _variable_lengths(query, key, value, query_sizes, sizes)
    batches = zip(unpack(query, query_sizes), unpack(key, sizes), unpack(value, sizes))
    return concat([functional.attention(*batch).flatten(0, 1) for batch in batches])


def _variable_lengths(query: Tensor, key: Tensor, value: Tensor, query_sizes: Sizes, sizes: Sizes) -> Tensor:
    """The same in one call of the kernel for sequences of any lengths, which needs half precision on a GPU."""
    mixed, _ = flash_attention.flash_attn_unpadded(
        query,
        key,
        value,
        _offsets(query_sizes, paddle.get_device()),
        _offsets(sizes, paddle.get_device()),
        max(tokens for _, tokens in query_sizes),
        max(tokens for _, tokens in sizes),
        query.shape[-1] ** -0.5,
    )
    return mixed


@functools.lru_cache(maxsize=8)  # every block asks
def _offsets(sizes: Sizes, device: str) -> Tensor:
    """Where each sequence begins, and the end, on the current device: int32 [1 + sum of B_i]."""
    lengths = [paddle.full([sequences], tokens, "int32") for sequences, tokens in sizes]
    return paddle.concat([paddle.zeros([1], "int32"), *lengths]).cumsum(dtype="int32")


def runs_of_equal_sizes(batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """The batches in runs of neighbours whose shapes differ in the first axis alone."""
    return [list(run) for _, run in itertools.groupby(batches, key=lambda batch: batch.shape[1:])]


def split(x: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """`x.split(rows)`, which leaves a single part as it is."""
    return [x] if len(rows) == 1 else x.split(list(rows))


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """`paddle.concat(tensors)`, which leaves a single tensor as it is."""
    return tensors[0] if len(tensors) == 1 else paddle.concat(tensors)
