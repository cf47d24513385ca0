"""A linear classifier on a frozen backbone."""

from __future__ import annotations

from typing import Callable

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.models.layers import ZERO, check_positive, in_full_precision
from passl.models.method import Method
from passl.registry import METHODS


class LinearClassifier(nn.Layer):
    """One linear layer, N(0, 0.01) and bias 0. [B, in_dim] -> [B, num_classes]."""

    def __init__(self, in_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, num_classes, weight_attr=nn.initializer.Normal(std=0.01), bias_attr=ZERO)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@METHODS.register()
class LinearProbe(Method):
    """Trains a linear classifier on the features of a frozen backbone (Caron et al. 2021, section 4.1).

    The features of a transformer are the normalised [CLS] tokens of its last `n_last_blocks` blocks; with `avgpool` the
    mean of the last block's patch tokens is added, interleaved with its [CLS]: [cls_0, mean_0, cls_1, mean_1, ...].
    A backbone without `get_intermediate_layers` (a convnet) gives its output, whatever these two say.
    """

    needs_pretrained = True

    def __init__(
        self,
        backbone: Callable[..., nn.Layer],
        num_classes: int,
        n_last_blocks: int = 4,
        avgpool: bool = False,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        self.backbone = backbone()
        self._has_blocks = hasattr(self.backbone, "get_intermediate_layers")
        if not hasattr(self.backbone, "embed_dim"):
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} has no embed_dim, the width of its output: a linear "
                "probe needs it, and get_intermediate_layers(images, n) of a transformer"
            )
        if self._has_blocks:
            _check_num_blocks(n_last_blocks, self.backbone)
        self.backbone.eval()
        for parameter in self.backbone.parameters():
            parameter.stop_gradient = True
        self.num_classes = num_classes
        self.n_last_blocks = n_last_blocks
        self.avgpool = avgpool
        self._labels_checked = False
        width = n_last_blocks + int(avgpool) if self._has_blocks else 1
        self.linear = LinearClassifier(self.backbone.embed_dim * width, num_classes)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: "image" [B, C, H, W], "label" [B] -> the loss, and top1 and (with 5 classes or more) top5 in percent.

        metric and CELoss repeat top1 and loss under the names of PASSL's log line.
        """
        _check_keys(batch)
        label = batch["label"]
        self._check_labels(label)
        logits = self.predict(batch["image"])
        with paddle.amp.auto_cast(enable=False):
            loss = F.cross_entropy(logits, label)
        hits = paddle.topk(logits, min(5, self.num_classes))[1] == label.unsqueeze(-1)
        percent = hits.astype("float32").sum(0) * (100.0 / label.shape[0])  # by rank
        outputs = {"top1": percent[0], "metric": percent[0]}
        if self.num_classes >= 5:
            outputs["top5"] = percent.sum()
        return {**outputs, "CELoss": loss, "loss": loss}

    def _check_labels(self, label: Tensor) -> None:
        # Reading a number from a GPU would stall its queue at every step: there the first batch speaks for all.
        if self._labels_checked and not label.place.is_cpu_place():
            return
        self._labels_checked = True
        smallest, largest = label.min().item(), label.max().item()
        if smallest < 0 or largest >= self.num_classes:
            raise ValueError(
                f"labels must be in 0 to {self.num_classes - 1} (num_classes is {self.num_classes}), and the batch has "
                f"labels from {smallest} to {largest}: set num_classes to the number of classes in the data"
            )

    def predict(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, num_classes]"""
        return in_full_precision(self.linear, self.features(images))

    def half_precision_layers(self) -> list[nn.Layer]:
        return [self.backbone]

    @paddle.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> what the classifier sees, [B, D*(n_last_blocks + avgpool)]"""
        if self.backbone.training:  # here, because train() of any layer above switches the flag
            self.backbone.eval()
        if not self._has_blocks:
            return self.backbone(images)
        tokens = self.backbone.get_intermediate_layers(images, self.n_last_blocks)
        parts = [x[:, 0] for x in tokens]
        if self.avgpool:
            pair = paddle.stack([parts[-1], tokens[-1][:, 1:].mean(1)], axis=-1)
            parts[-1] = pair.reshape([images.shape[0], -1])
        return paddle.concat(parts, axis=-1)

    def backbone_output(self, features: Tensor) -> Tensor:
        """The backbone's own output, [B, D], which is a part of `features`."""
        dim = self.backbone.embed_dim
        if self._has_blocks and self.avgpool:
            return features[:, -2 * dim :].reshape([-1, dim, 2])[:, :, 0]
        return features[:, -dim:]


def _check_num_blocks(n_last_blocks: int, backbone: nn.Layer) -> None:
    depth = len(backbone.blocks) if hasattr(backbone, "blocks") else None
    if n_last_blocks < 1 or (depth is not None and n_last_blocks > depth):
        limit = "at least 1" if depth is None else f"between 1 and the number of the backbone's blocks ({depth})"
        raise ValueError(f"n_last_blocks ({n_last_blocks}) must be {limit}")


def _check_keys(batch: dict[str, Tensor]) -> None:
    for key, remedy in (
        ("image", "give the data set a transform that yields one image (RandomResizedCrop ... ToTensor, no MultiCrop)"),
        ("label", "use a data set with labels: class folders (ImageFolder), or a csv list_file with a column 'label'"),
    ):
        if key not in batch:
            raise ValueError(
                f"LinearProbe needs '{key}', and the batch has only {', '.join(batch) or 'nothing'}: {remedy}"
            )
