"""What the evaluator Classification writes beside its numbers."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from passl.evaluators import metrics
from passl.evaluators.confusion import draw_confusion
from passl.evaluators.names import relative_names
from passl.formats.atomic import replacing

logger = logging.getLogger("passl")

_WORST = 5  # classes in the log
_MOST_DRAWN = 1000


class ClassificationReport:
    """Of the logits [N, C] and labels [N] of a data set; numbers in percent, AUC from 0 to 1.

    names: of all C classes.
    """

    def __init__(self, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
        self.names = list(names)
        self.labels = labels
        log_probabilities = metrics.log_softmax(logits)
        self.confidence = np.exp(log_probabilities.max(axis=1))
        self.predicted = logits.argmax(axis=1)
        self.confusion = metrics.confusion_matrix(self.predicted, labels, len(self.names))
        self.recalls = metrics.recalls(self.confusion)
        self.aucs = metrics.one_vs_rest_auc(log_probabilities, labels)

    def numbers(self) -> dict[str, float]:
        """`balanced_accuracy`, and `auc`, the mean over the classes that have one; left out where none has."""
        known = self.aucs[~np.isnan(self.aucs)]
        found = {"balanced_accuracy": metrics.balanced_accuracy(self.confusion)}
        if len(known):
            found["auc"] = float(known.mean())
        else:
            logger.info("AUC needs images of at least two classes: left out")
        return found

    def log(self) -> None:
        """The classes that are least often right."""
        known = np.flatnonzero(~np.isnan(self.recalls))
        worst = known[np.argsort(self.recalls[known], kind="stable")][:_WORST]
        counts = self.confusion.sum(axis=1)
        shown = ", ".join(f"{self.names[c]} {self.recalls[c]:.1f} % of {counts[c]}" for c in worst)
        logger.info("least often right: %s", shown)

    def write(self, folder: Path) -> None:
        """`per_class.csv`, `confusion.csv` and `confusion.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        precisions, counts = metrics.precisions(self.confusion), self.confusion.sum(axis=1)
        rows = [
            (name, counts[c], *(_number(values[c]) for values in (self.recalls, precisions, 100 * self.aucs)))
            for c, name in enumerate(self.names)
        ]
        _write_csv(folder / "per_class.csv", ("class", "images", "accuracy", "precision", "auc_percent"), rows)
        _write_csv(
            folder / "confusion.csv",
            ("true class", *self.names),
            [(name, *row) for name, row in zip(self.names, self.confusion.tolist())],
        )
        if 2 <= len(self.names) <= _MOST_DRAWN:
            draw_confusion(self.confusion, self.names, folder / "confusion.png")

    def write_predictions(self, target: Path, dataset: Any, indices: np.ndarray) -> None:
        """A line for each image: its path in the data set, label, prediction and the probability of that."""
        paths = relative_names(dataset)
        rows = [
            (paths[index], self.names[label], self.names[guess], f"{probability:.6f}", int(label == guess))
            for index, label, guess, probability in zip(indices, self.labels, self.predicted, self.confidence)
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_csv(target, ("path", "class", "predicted", "probability", "right"), rows)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def _write_csv(target: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with replacing(target) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
