"""What the methods share that learn classes from labels: a linear layer on features, its loss and its rates."""

from __future__ import annotations

from typing import Optional

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.config import ConfigError
from passl.models.layers import ZERO, check_positive, in_full_precision
from passl.models.method import Method


class LinearClassifier(nn.Layer):
    """One linear layer, N(0, 0.01) and bias 0. [B, in_dim] -> [B, num_classes]."""

    def __init__(self, in_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, num_classes, weight_attr=nn.initializer.Normal(std=0.01), bias_attr=ZERO)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Classifier(Method):
    """A backbone and a linear classifier `linear` on `features`.

    A subclass sets `linear` and defines `features`, `backbone_output` and `forward`.
    """

    needs_pretrained = True
    linear: LinearClassifier

    def __init__(self, backbone: nn.Layer, num_classes: int) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        if not hasattr(backbone, "embed_dim"):
            raise ValueError(
                f"the backbone {type(backbone).__name__} has no embed_dim, the width of its output: {self._title()} "
                "needs it, and get_intermediate_layers(images, n) of a transformer"
            )
        self.backbone = backbone
        self.num_classes = num_classes
        self._has_blocks = hasattr(backbone, "get_intermediate_layers")
        self._labels_checked = False

    def _title(self) -> str:
        return f"a {type(self).__name__}"

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> what the classifier sees, [B, D]"""
        raise NotImplementedError

    def backbone_output(self, features: Tensor) -> Tensor:
        """Of `features` what stands for the image without the classifier, [B, embed_dim]."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, num_classes]"""
        return in_full_precision(self.linear, self.features(images))

    def half_precision_layers(self) -> list[nn.Layer]:
        return [self.backbone]

    def checked(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B] of a batch.

        Raises:
            ValueError: one of them is missing, or a label is none of the classes.
        """
        _check_keys(type(self).__name__, batch)
        self._check_labels(batch["label"])
        return batch["image"], batch["label"]

    def _check_labels(self, label: Tensor) -> None:
        # Reading a number from a GPU would stall its queue at every step: there the first batch speaks for all.
        if self._labels_checked and not label.place.is_cpu_place():
            return
        self._labels_checked = True
        smallest, largest = label.min().item(), label.max().item()
        if smallest < 0 or largest >= self.num_classes:
            raise ConfigError(
                [
                    f"labels must be in 0 to {self.num_classes - 1} (num_classes is {self.num_classes}), and the batch "
                    f"has labels from {smallest} to {largest}: set num_classes to the number of classes in the data"
                ]
            )

    def outputs(self, logits: Tensor, label: Tensor, loss: Optional[Tensor] = None) -> dict[str, Tensor]:
        """The loss (None: cross-entropy), and top1 and (with 5 classes or more) top5 in percent.

        metric and CELoss repeat top1 and loss under the names of PASSL's log line.
        """
        if loss is None:
            with paddle.amp.auto_cast(enable=False):
                loss = F.cross_entropy(logits, label)
        hits = paddle.topk(logits, min(5, self.num_classes))[1] == label.unsqueeze(-1)
        percent = hits.astype("float32").sum(0) * (100.0 / label.shape[0])  # by rank
        outputs = {"top1": percent[0], "metric": percent[0]}
        if self.num_classes >= 5:
            outputs["top5"] = percent.sum()
        return {**outputs, "CELoss": loss, "loss": loss}


def _check_keys(method: str, batch: dict[str, Tensor]) -> None:
    for key, remedy in (
        ("image", "give the data set a transform that yields one image (RandomResizedCrop ... ToTensor, no MultiCrop)"),
        ("label", "use a data set with labels: class folders (ImageFolder), or a csv list_file with a column 'label'"),
    ):
        if key not in batch:
            raise ConfigError(
                [f"{method} needs '{key}', and the batch has only {', '.join(batch) or 'nothing'}: {remedy}"]
            )
