"""Stochastic depth (Huang et al. 2016): residual branches that are left out of some samples in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Optional

import paddle
from paddle import Tensor, nn

from passl.models import packs
from passl.models.packs import Sizes

# (x, mask, sizes) -> what it adds, as a block's branches.
Branch = Callable[[Tensor, Optional[Tensor], Optional[Sizes]], Tensor]


class DropPath(nn.Layer):
    """Drops whole samples of a residual branch in training, each by itself, with the probability `rate`.

    Kept samples are divided by the probability of keeping. x: [B, ...] -> same shape; or a pack and its sizes.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate ({rate}) must be in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor, sizes: Optional[Sizes] = None) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        samples = x.shape[0] if sizes is None else sum(sequences for sequences, _ in sizes)
        mask = paddle.bernoulli(paddle.full([samples] + [1] * (x.ndim - 1), keep, dtype="float32")) / keep
        if sizes is not None:
            parts = zip(packs.split(mask, [sequences for sequences, _ in sizes]), sizes)
            mask = packs.concat([part.expand(size).reshape([-1, 1]) for part, size in parts])
        return x * mask.astype(x.dtype)

    def add(
        self,
        shortcut: Tensor,
        shortcut_sizes: Optional[Sizes],
        branch: Branch,
        x: Tensor,
        mask: Optional[Tensor],
        sizes: Optional[Sizes],
    ) -> Tensor:
        """shortcut + branch(x, mask, sizes), with paths dropped. The shortcut may have fewer tokens than x."""
        return shortcut + self(branch(x, mask, sizes), shortcut_sizes)


class SubsetDropPath(DropPath):
    """Drops paths by computing the branch for some of the samples alone: max(int(B * (1 - rate)), 1) of B, drawn anew.

    As in DINOv2 (Oquab et al. 2023) for crops of several sizes, at any rate above 0 (its code for a single batch keeps
    to DropPath up to 0.1). In every batch of a pack B counts for itself, and what is dropped costs nothing. What the
    branch adds is multiplied by B / kept, so that the expectation is that of no dropping.
    """

    def add(
        self,
        shortcut: Tensor,
        shortcut_sizes: Optional[Sizes],
        branch: Branch,
        x: Tensor,
        mask: Optional[Tensor],
        sizes: Optional[Sizes],
    ) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return shortcut + branch(x, mask, sizes)
        # The rows of a batch are whole samples.
        rows_of, shortcut_rows_of = sizes or ((x.shape[0], 1),), shortcut_sizes or ((x.shape[0], 1),)
        kept = [min(max(int(batch * (1.0 - self.rate)), 1), batch) for batch, _ in rows_of]  # of none, none
        drawn = [paddle.randperm(batch)[:count] for count, (batch, _) in zip(kept, rows_of)]
        rows = _rows(drawn, rows_of)
        added = branch(
            x.index_select(rows),
            mask if mask is None else mask.index_select(rows),
            sizes and tuple((count, tokens) for count, (_, tokens) in zip(kept, sizes)),
        )
        parts = packs.split(added, [count * tokens for count, (_, tokens) in zip(kept, shortcut_rows_of)])
        factors = [batch / max(count, 1) for count, (batch, _) in zip(kept, rows_of)]
        added = packs.concat([part * factor for part, factor in zip(parts, factors)])
        if added.dtype != shortcut.dtype:
            added, shortcut = added.astype("float32"), shortcut.astype("float32")
        return paddle.index_add(shortcut, _rows(drawn, shortcut_rows_of), 0, added)


def _rows(drawn: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """The rows of a pack that belong to the sequences which are drawn from each of its batches: int64 [rows]."""
    rows, start = [], 0
    for numbers, (sequences, tokens) in zip(drawn, sizes):
        rows.append((numbers.unsqueeze(1) * tokens + paddle.arange(start, start + tokens)).flatten())
        start += sequences * tokens
    return packs.concat(rows)
