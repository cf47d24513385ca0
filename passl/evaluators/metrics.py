"""Numbers from the logits and labels of a whole data set. Shapes: N images, C classes."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities [N, C] float64 of logits [N, C]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """[C, C]: how many images of the class of the row were taken for that of the column."""
    cells = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(cells, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Accuracy in percent of each class [C]; NaN of a class without images."""
    return _percent(np.diag(confusion), confusion.sum(axis=1))


def precisions(confusion: np.ndarray) -> np.ndarray:
    """Percentage of right ones among the images taken for each class [C]; NaN of a class that none was taken for."""
    return _percent(np.diag(confusion), confusion.sum(axis=0))


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(100.0 * part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def balanced_accuracy(confusion: np.ndarray) -> float:
    """Mean accuracy in percent of the classes that have images, NaN if none has: each class counts alike."""
    known = recalls(confusion)[confusion.any(axis=1)]
    return float(known.mean()) if len(known) else float("nan")


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve, 0 to 1: how often a positive image has a higher score than a negative one; equal scores
    count as half (Mann & Whitney 1947). NaN where one of the two kinds is missing.

    Args:
        scores: [N]; positive: [N] of booleans.
    """
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return float("nan")
    _, place, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(sizes) - (sizes - 1) / 2  # the mean rank of equal scores, from 1
    return float((ranks[place.ravel()][positive].sum() - count * (count + 1) / 2) / (count * others))


def one_vs_rest_auc(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`auc` of each class against all others [C], by its own probabilities [N, C]."""
    # What is equal but for the order of a sum must count as equal; as logarithms those close to 1 stay apart.
    scores = log_probabilities.astype(np.float32)
    return np.array([auc(scores[:, label], labels == label) for label in range(scores.shape[1])])
