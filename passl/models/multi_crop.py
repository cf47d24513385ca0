"""A network over crops of several sizes, as student and teacher of self-distillation are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import paddle
from paddle import Tensor, nn

from passl.models import packs
from passl.models.blocks import are_unchanged
from passl.models.layers import has_hooks, in_full_precision
from passl.models.vision_transformer import TokenTransformer


class MultiCropNetwork(nn.Layer):
    """Backbone and head over crops of several sizes. Crops: list of [B_i, C, H_i, W_i] -> [sum of B_i, K].

    Attributes:
        frozen: the backbone is as in evaluation, and gets no gradient; see `freeze`.
    """

    def __init__(self, backbone: nn.Layer, head: nn.Layer) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen = False

    def freeze(self, frozen: bool) -> None:
        """For the coming forward passes. A frozen backbone drops no paths, and its batch norms use their running
        statistics and leave them as they are.
        """
        if frozen and self.backbone.training:  # each time, because train() of any layer above switches the flag
            self.backbone.eval()
        elif self.frozen and not frozen and self.training:
            self.backbone.train()
        self.frozen = frozen

    def features(self, crops: Sequence[Tensor]) -> Tensor:
        """What the backbone makes of all crops: [sum of B_i, D]."""
        with paddle.no_grad() if self.frozen else contextlib.nullcontext():
            return features_of_crops(self.backbone, crops)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        # One call for all crops, so that batch norms in the head see them together. In full precision: at half of it
        # the logits of many prototypes overflow, or differ by less than what is left of them.
        return in_full_precision(self.head, self.features(crops))


def features_of_crops(backbone: nn.Layer, crops: Sequence[Tensor]) -> Tensor:
    """[sum of B_i, D], as `backbone` gives them, which is called once for each run of crops of one size; or by its own
    method of this name.
    """
    if hasattr(backbone, "features_of_crops"):
        return backbone.features_of_crops(crops)
    if _is_unchanged(backbone):
        return backbone.cls_of_crops(crops)
    return packs.concat([backbone(packs.concat(run)) for run in packs.runs_of_equal_sizes(crops)])


def _is_unchanged(backbone: nn.Layer) -> bool:
    """Whether it is a transformer of passl's, which may do less than its forward. Hooks are to see what they see
    elsewhere; a forward, a block or a part of one of somebody's own has the last word.
    """
    if getattr(backbone.forward, "__func__", None) is not TokenTransformer.forward:
        return False
    return are_unchanged(backbone.blocks) and not has_hooks(backbone)
