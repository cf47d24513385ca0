"""Accuracy of a model that predicts classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from passl.evaluators.evaluator import Evaluator, map_dataset
from passl.registry import EVALUATORS


@EVALUATORS.register()
class Classification(Evaluator):
    """Top-k accuracy in percent, and cross-entropy, of a method with ``predict(images) -> logits`` (a linear probe).

    Args:
        dataset: labelled images.
        topk: a k above the number of classes counts every image as right, as in the official code.
    """

    subject = "method"
    key_metric = "top1"

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 64,
        num_workers: int = 0,
        topk: Sequence[int] = (1, 5),
        prefetch_factor: int = 2,
        use_shared_memory: bool = True,
    ) -> None:
        if dataset.labels is None:
            raise ValueError("the data set of the Classification evaluator has no labels")
        check_batches(batch_size, num_workers)
        if prefetch_factor < 1:
            raise ValueError(f"prefetch_factor ({prefetch_factor}) must be at least 1")
        if not topk or min(topk) < 1:
            raise ValueError(f"topk ({list(topk)}) must be one or more numbers above 0")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.use_shared_memory = use_shared_memory
        self.topk = tuple(topk)
        self.key_metric = f"top{self.topk[0]}"

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        def logits_of(images: paddle.Tensor) -> paddle.Tensor:
            return model.predict(images).astype("float32")

        logits, labels, _ = map_dataset(
            logits_of,
            self.dataset,
            self.batch_size,
            "validation",
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            use_shared_memory=self.use_shared_memory,
        )
        result = {f"top{k}": accuracy(logits, labels, k) for k in self.topk}
        loss = nn.functional.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels)).item()
        return {**result, "loss": loss}


def accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percentage of rows of ``logits`` [N, C] whose label [N] is among the k largest."""
    return 100.0 * (count_hits(logits, labels, k) / len(logits))


def count_hits(logits: np.ndarray, labels: np.ndarray, k: int) -> int:
    """Number of rows of ``logits`` [N, C] whose label [N] is among the k largest."""
    k = min(k, logits.shape[1])
    largest = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return int((largest == labels[:, None]).any(axis=1).sum())


def check_batches(batch_size: int, num_workers: int) -> None:
    """Raises ValueError for what an evaluator's loader would refuse, before anything is trained."""
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")
    if num_workers < 0:
        raise ValueError(f"num_workers ({num_workers}) must be at least 0")
