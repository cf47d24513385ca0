"""A linear classifier on a frozen backbone."""

from __future__ import annotations

from typing import Callable, Optional

import paddle
from paddle import Tensor, nn

from passl.models.classifier import Classifier, LinearClassifier
from passl.registry import METHODS

__all__ = ["LinearClassifier", "LinearProbe", "check_num_blocks", "probe_features"]


@METHODS.register()
class LinearProbe(Classifier):
    """Trains a linear classifier on the features of a frozen backbone (Caron et al. 2021, section 4.1).

    The features of a transformer are the normalised [CLS] tokens of its last `n_last_blocks` blocks; with `avgpool` the
    mean of the last block's patch tokens is added, interleaved with its [CLS]: [cls_0, mean_0, cls_1, mean_1, ...].
    A backbone without `get_intermediate_layers` (a convnet) gives its output, whatever these two say.
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Layer],
        num_classes: int,
        n_last_blocks: int = 4,
        avgpool: bool = False,
    ) -> None:
        super().__init__(backbone(), num_classes)
        if self._has_blocks:
            check_num_blocks(n_last_blocks, self.backbone)
        self.backbone.eval()
        for parameter in self.backbone.parameters():
            parameter.stop_gradient = True
        self.n_last_blocks = n_last_blocks
        self.avgpool = avgpool
        width = n_last_blocks + int(avgpool) if self._has_blocks else 1
        self.linear = LinearClassifier(self.backbone.embed_dim * width, num_classes)

    def _title(self) -> str:
        return "a linear probe"

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: "image" [B, C, H, W], "label" [B] -> the loss and the rates, see `Classifier.outputs`."""
        images, label = self.checked(batch)
        return self.outputs(self.predict(images), label)

    @paddle.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> what the classifier sees, [B, D*(n_last_blocks + avgpool)]"""
        if self.backbone.training:  # here, because train() of any layer above switches the flag
            self.backbone.eval()
        if not self._has_blocks:
            return self.backbone(images)
        tokens = self.backbone.get_intermediate_layers(images, self.n_last_blocks)
        return probe_features([x[:, 0] for x in tokens], tokens[-1][:, 1:].mean(1) if self.avgpool else None)

    def backbone_output(self, features: Tensor) -> Tensor:
        """The backbone's own output, [B, D], which is a part of `features`."""
        dim = self.backbone.embed_dim
        if self._has_blocks and self.avgpool:
            return features[:, -2 * dim :].reshape([-1, dim, 2])[:, :, 0]
        return features[:, -dim:]


def probe_features(cls_tokens: list[Tensor], mean: Optional[Tensor] = None) -> Tensor:
    """[CLS] tokens [B, D] of some blocks, the earliest first, and the last block's mean patch token [B, D], in the
    order that published classifiers expect.
    """
    parts = list(cls_tokens)
    if mean is not None:
        parts[-1] = paddle.stack([parts[-1], mean], axis=-1).reshape([mean.shape[0], -1])
    return paddle.concat(parts, axis=-1)


def check_num_blocks(n_last_blocks: int, backbone: nn.Layer) -> None:
    """Raises ValueError for more blocks than ``backbone`` has, or none."""
    depth = len(backbone.blocks) if hasattr(backbone, "blocks") else None
    if n_last_blocks < 1 or (depth is not None and n_last_blocks > depth):
        limit = "at least 1" if depth is None else f"between 1 and the number of the backbone's blocks ({depth})"
        raise ValueError(f"n_last_blocks ({n_last_blocks}) must be {limit}")
