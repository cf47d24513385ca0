"""Several feature vectors of an image in the loss, each with a head and a centre of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import Tensor, nn

from passl.models.dino_loss import DINOLoss


class ParallelHeads(nn.Layer):
    """A head for each part of the features. [B, sum of in_dims] -> [B, sum of the heads' out_dim].

    in_dims: widths of the parts. head: builder that takes `in_dim`.
    """

    def __init__(self, in_dims: Sequence[int], head: Callable[..., nn.Layer]) -> None:
        super().__init__()
        self.in_dims = list(in_dims)
        self.heads = nn.LayerList([head(in_dim=width) for width in in_dims])
        self.out_dim = sum(one.out_dim for one in self.heads)

    @property
    def last_layer(self) -> nn.Layer:
        """Those of all heads."""
        return nn.LayerList([head.last_layer for head in self.heads])

    def forward(self, x: Tensor) -> Tensor:
        return paddle.concat([head(part) for head, part in zip(self.heads, x.split(self.in_dims, axis=-1))], axis=-1)


class ParallelLoss(nn.Layer):
    """The mean of the losses between the parts of the logits. It does what `DINOLoss` does, for each of ``losses``.

    out_dims: the widths of the parts.
    """

    def __init__(self, losses: Sequence[DINOLoss], out_dims: Sequence[int]) -> None:
        super().__init__()
        self.losses = nn.LayerList(losses)
        self.out_dims = list(out_dims)
        self.student_temp = losses[0].student_temp

    @property
    def center(self) -> Tensor:
        """The centres side by side, [1, K]."""
        return paddle.concat([loss.center for loss in self.losses], axis=-1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        parts = zip(student_logits.split(self.out_dims, axis=-1), teacher_logits.split(self.out_dims, axis=-1))
        losses = [loss(*logits, teacher_temp) for loss, logits in zip(self.losses, parts)]
        return sum(losses) / len(losses)

    def forget(self) -> None:
        for loss in self.losses:
            loss.forget()

    def update_center(self) -> None:
        for loss in self.losses:
            loss.update_center()
