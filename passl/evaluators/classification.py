"""Accuracy of a model that predicts classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import paddle
from paddle import nn

from passl import distributed
from passl.evaluators.classification_report import ClassificationReport
from passl.evaluators.evaluator import Evaluator, map_dataset
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")


@EVALUATORS.register()
class Classification(Evaluator):
    """Top-k accuracy in percent, and cross-entropy, of a method with ``predict(images) -> logits`` (a linear probe).

    Args:
        dataset: labelled images.
        topk: a k above the number of classes counts every image as right, as in the official code.
        report: also `balanced_accuracy` and `auc` (one class against the rest, their mean), and in the run's folder
            `per_class.csv`, `confusion.csv` and, for 2 to 1000 classes, `confusion.png`. passl-eval writes the files of
            DataLoader.Eval in any case.
        predictions: name of a file in the run's folder, such as predictions.csv, with a line for each image.

    Attributes:
        writes_files: whether `report`'s files are written.
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
        report: bool = False,
        predictions: Optional[str] = None,
    ) -> None:
        if dataset.labels is None:
            raise ValueError("the data set of the Classification evaluator has no labels")
        check_batches(batch_size, num_workers)
        if prefetch_factor < 1:
            raise ValueError(f"prefetch_factor ({prefetch_factor}) must be at least 1")
        if not topk or min(topk) < 1:
            raise ValueError(f"topk ({list(topk)}) must be one or more numbers above 0")
        if predictions is not None and (not predictions or Path(predictions).name != predictions):
            raise ValueError(f"predictions ({predictions!r}) must be the name of a file, without a folder")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.use_shared_memory = use_shared_memory
        self.report = report
        self.writes_files = report
        self.predictions = predictions
        self.topk = tuple(topk)
        self.key_metric = f"top{self.topk[0]}"

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        def logits_of(images: paddle.Tensor) -> paddle.Tensor:
            return model.predict(images).astype("float32")

        logits, labels, indices = map_dataset(
            logits_of,
            self.dataset,
            self.batch_size,
            "validation",
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            use_shared_memory=self.use_shared_memory,
        )
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(
                f"labels must be in 0 to {logits.shape[1] - 1}, the classes of the model, and are from {labels.min()} "
                f"to {labels.max()}"
            )
        broken = np.count_nonzero(np.isnan(logits).any(axis=1))
        if broken:
            logger.warning("the logits of %d of %d images are not numbers: none of these is right", broken, len(logits))
        result = {f"top{k}": accuracy(logits, labels, k) for k in self.topk}
        loss = nn.functional.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels)).item()
        result["loss"] = loss
        if self.report or self.writes_files or self.predictions:
            result.update(self._reported(logits, labels, indices, Path(output_dir)))
        return result

    def _reported(self, logits: np.ndarray, labels: np.ndarray, indices: np.ndarray, folder: Path) -> dict[str, float]:
        """Numbers for the result; the first process works them out and writes the files."""
        numbers: dict[str, float] = {}
        if distributed.is_main():
            names = list(self.dataset.class_names)
            # A model may have more classes than there are folders here.
            names += [str(label) for label in range(len(names), logits.shape[1])]
            report = ClassificationReport(logits, labels, names[: logits.shape[1]])
            report.log()
            if self.writes_files:
                report.write(folder)
            if self.predictions:
                report.write_predictions(folder / self.predictions, self.dataset, indices)
            numbers = report.numbers() if self.report else {}
        return distributed.broadcast_object(numbers)


def accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percentage of rows of ``logits`` [N, C] whose label [N] is among the k largest."""
    return 100.0 * (count_hits(logits, labels, k) / len(logits))


def count_hits(logits: np.ndarray, labels: np.ndarray, k: int) -> int:
    """Number of rows of ``logits`` [N, C] whose label [N] is among the k largest. A row with a NaN is no hit."""
    k = min(k, logits.shape[1])
    largest = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    hits = (largest == labels[:, None]).any(axis=1)
    return int((hits & ~np.isnan(logits).any(axis=1)).sum())


def check_batches(batch_size: int, num_workers: int) -> None:
    """Raises ValueError for what an evaluator's loader would refuse, before anything is trained."""
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")
    if num_workers < 0:
        raise ValueError(f"num_workers ({num_workers}) must be at least 0")
