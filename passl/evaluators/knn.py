"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, section 3.4; the official DINO's
protocol).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from passl.evaluators.classification import accuracy
from passl.evaluators.evaluator import Evaluator, map_dataset
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")

_CHUNK_ELEMENTS = 1 << 25  # similarities held at a time: 128 MB of float32


@EVALUATORS.register()
class KNN(Evaluator):
    """Top-1 and top-5 accuracy in percent for each ``k``, by votes of the nearest training images.

    Args:
        train_dataset, val_dataset: labelled images, with the validation transform on both.
        k: neighbours; a k above the number of training images uses them all.
        temperature: of the votes ``exp(similarity / temperature)``.
    """

    def __init__(
        self,
        train_dataset: Any,
        val_dataset: Any,
        k: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        for name, dataset in (("train_dataset", train_dataset), ("val_dataset", val_dataset)):
            if dataset.labels is None:
                raise ValueError(
                    f"KNN needs labels, and {name} has none: use class folders (ImageFolder) or a csv (ImageList)"
                )
        _check(k, temperature)
        _check_classes(train_dataset, val_dataset)
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.k = tuple(k)
        self.temperature = temperature
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.key_metric = f"knn_top1_k{20 if 20 in self.k else self.k[0]}"

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        train, train_labels = self._features(model, self.train_dataset, "k-NN: train features")
        val, val_labels = self._features(model, self.val_dataset, "k-NN: val features")
        if max(self.k) > len(train):
            logger.warning("k-NN: only %d training images: a larger k uses them all", len(train))
        results = {}
        for k, votes in knn_classify(train, train_labels, val, self.k, self.temperature).items():
            results[f"knn_top1_k{k}"] = accuracy(votes, val_labels, 1)
            results[f"knn_top5_k{k}"] = accuracy(votes, val_labels, 5)
        return results

    def _features(self, model: nn.Layer, dataset: Any, title: str) -> tuple[np.ndarray, np.ndarray]:
        def features(images: paddle.Tensor) -> paddle.Tensor:
            return normalize(model(images).astype("float32"))

        return map_dataset(features, dataset, self.batch_size, self.num_workers, title)


def normalize(features: paddle.Tensor) -> paddle.Tensor:
    """Rows of ``features`` [N, D] at length 1 (rows of zeros stay zero)."""
    return features / features.square().sum(axis=1, keepdim=True).sqrt().clip(min=1e-12)


def knn_classify(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
) -> dict[int, np.ndarray]:
    """Votes for each class: each of the k most similar training rows adds ``exp(similarity / temperature)`` to its
    class.

    Memory does not grow with the number of test rows or classes beyond the result itself.

    Args:
        train: [N, D] float32, rows of length 1; train_labels: [N] class indices from 0.
        test: [M, D], rows of length 1.

    Returns:
        k -> votes [M, C] float64, C = largest training label + 1; the largest vote is the prediction.

    Raises:
        ValueError: an empty set, a k below 1, a temperature that is not positive, or a label below 0.
    """
    _check(k, temperature)
    if not len(train) or not len(test):
        raise ValueError(f"k-NN needs images: {len(train)} train, {len(test)} test")
    if train_labels.min() < 0:
        raise ValueError("k-NN needs a label for every training image")
    num_classes = int(train_labels.max()) + 1
    most = min(max(k), len(train))
    memory = paddle.to_tensor(train)
    chunk = max(1, _CHUNK_ELEMENTS // len(train))
    votes = {size: np.zeros((len(test), num_classes)) for size in k}
    for start in range(0, len(test), chunk):
        rows = paddle.to_tensor(test[start : start + chunk])
        similarity, neighbours = paddle.topk(paddle.matmul(rows, memory, transpose_y=True), most, axis=1)
        weights = np.exp(similarity.numpy().astype(np.float64) / temperature)
        cells = np.arange(len(rows))[:, None] * num_classes + train_labels[neighbours.numpy()]
        for size in k:
            counted = np.bincount(cells[:, :size].ravel(), weights[:, :size].ravel(), len(rows) * num_classes)
            votes[size][start : start + len(rows)] = counted.reshape(len(rows), num_classes)
    return votes


def _check(k: Sequence[int], temperature: float) -> None:
    if not k or min(k) < 1:
        raise ValueError(f"k ({list(k)}) must be one or more numbers above 0")
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive")


def _check_classes(train_dataset: Any, val_dataset: Any) -> None:
    """Labels are positions in the sorted class names: two folders must have the same ones."""
    train, val = train_dataset.class_names, val_dataset.class_names
    if train and val and list(train) != list(val):
        differing = sorted(set(train) ^ set(val))
        raise ValueError(
            f"the {len(train)} training and {len(val)} validation classes differ, so labels would not agree; "
            f"only in one of them: {', '.join(differing[:10])}"
        )
