"""What is exported: networks whose forward takes images alone, and which name their outputs."""

from __future__ import annotations

from typing import Union

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.models.classifier import Classifier
from passl.models.method import Method


class FeatureNetwork(nn.Layer):
    """A backbone alone. images [B, C, H, W] -> features [B, D]"""

    outputs = ("features",)
    classifier = None
    num_classes = 0

    def __init__(self, backbone: nn.Layer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.backbone(images),)


class ProbeNetwork(nn.Layer):
    """A linear probe or fine-tuned network. images [B, C, H, W] -> the backbone's features [B, D], logits [B, C] and
    probabilities [B, C].
    """

    outputs = ("features", "logits", "probabilities")

    def __init__(self, probe: Classifier) -> None:
        super().__init__()
        self.probe = probe
        self.num_classes = probe.num_classes
        self.classifier = {"kind": "linear"}
        self.backbone = probe.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        seen = self.probe.features(images)
        logits = self.probe.linear(seen)
        return self.probe.backbone_output(seen), logits, F.softmax(logits, axis=-1)


class PredictingNetwork(nn.Layer):
    """Any other method with `predict` and `num_classes`, a plug-in's for example; the same outputs."""

    outputs = ProbeNetwork.outputs

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.num_classes = method.num_classes
        self.classifier = {"kind": "linear"}
        self.backbone = method.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = self.method.predict(images)
        return self.backbone(images), logits, F.softmax(logits, axis=-1)


class KNNNetwork(nn.Layer):
    """A backbone and the votes of a bank of labelled features, as in the evaluator KNN, divided by their sum.

    images [B, C, H, W] -> features [B, D], probabilities [B, C]

    Args:
        bank: [N, D] float32, rows of length 1.
        labels: [N], from 0 to num_classes - 1.
        k: neighbours; more than N are all.
    """

    outputs = ("features", "probabilities")

    def __init__(
        self,
        backbone: nn.Layer,
        bank: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        k: int = 20,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        check_votes(k, temperature)
        if not np.isfinite(bank).all():
            raise ValueError("the bank has features that are not finite: the weights are probably broken")
        self.backbone = backbone
        self.num_classes = num_classes
        self.k = min(k, len(bank))
        self.temperature = temperature
        self.classifier = {"kind": "knn", "k": self.k, "temperature": temperature, "images": len(bank)}
        self.register_buffer("bank", paddle.to_tensor(np.ascontiguousarray(bank.T, np.float32)))  # [D, N]
        self.register_buffer("labels", paddle.to_tensor(np.asarray(labels, np.int64)))
        self.register_buffer("classes", paddle.arange(num_classes, dtype="int64"))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        return features, self.votes(features)

    def votes(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C], each row with sum 1"""
        unit = features * paddle.rsqrt((features * features).sum(axis=1, keepdim=True).clip(min=1e-24))
        similarity, neighbours = paddle.topk(paddle.matmul(unit, self.bank), self.k, axis=1)
        weights = F.softmax(similarity / self.temperature, axis=-1)  # the votes, with their sum at 1
        labels = paddle.gather(self.labels, neighbours.flatten()).reshape([-1, self.k, 1])
        hits = (labels == self.classes).astype("float32")  # [B, k, C]
        return paddle.matmul(weights.unsqueeze(1), hits).squeeze(1)


def check_votes(k: int, temperature: float) -> None:
    """Raises ValueError for what no bank can vote with."""
    if k < 1 or not temperature > 0:
        raise ValueError(f"k ({k}) must be at least 1 and temperature ({temperature}) above 0")


Exportable = Union[FeatureNetwork, ProbeNetwork, PredictingNetwork, KNNNetwork]


def multiple_of(backbone: nn.Layer) -> int:
    """What the sides of an image must be multiples of."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    return size if isinstance(size, int) else 1
