"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, section 3.4; the official DINO's
protocol).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import paddle
from paddle import nn

from passl import distributed
from passl.evaluators.classification import check_batches, count_hits
from passl.evaluators.evaluator import Evaluator, backbones_of, map_dataset
from passl.evaluators.labels import check_labelled
from passl.evaluators.neighbours import nearest
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")

_CHUNK_ELEMENTS = 1 << 22  # votes held at a time: 32 MB
_MAX_CLASSES = 1 << 20
_LOWEST_TEMPERATURE = 0.002  # below 0.0015 the vote of an equal image is infinite
_TOPS = (1, 5)
_PREFIXES = {"teacher": "", "student": "student_"}  # of the names of results


@EVALUATORS.register()
class KNN(Evaluator):
    """Top-1 and top-5 accuracy in percent for each ``k``, by votes of the nearest training images.

    Args:
        train_dataset, val_dataset: labelled images, with the validation transform on both.
        k: neighbours; a k above the number of training images uses them all.
        temperature: of the votes ``exp(similarity / temperature)``; from 0.002.
        models: whose features: the teacher's (or those of the only backbone), named ``knn_top1_k20`` and so on, and the
            student's, ``student_knn_top1_k20``. Each image is loaded once for both.
        prefix: of all these names: ``cifar10`` makes ``cifar10_knn_top1_k20`` of them, so that one configuration can
            have several KNN.
    """

    subject = "backbones"

    def __init__(
        self,
        train_dataset: Any,
        val_dataset: Any,
        k: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        batch_size: int = 64,
        num_workers: int = 0,
        models: Sequence[Literal["teacher", "student"]] = ("teacher",),
        prefix: str = "",
    ) -> None:
        check_labelled(train_dataset, val_dataset)
        _check(k, temperature)
        _check_models(models)
        if prefix and not re.fullmatch(r"[\w.-]+", prefix):
            raise ValueError(f"prefix ({prefix!r}) must be letters, digits, '_', '.' and '-', such as cifar10")
        check_batches(batch_size, num_workers)
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.k = tuple(dict.fromkeys(k))
        self.temperature = temperature
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.models = tuple(dict.fromkeys(models))
        self.prefix = prefix
        first = "teacher" if "teacher" in models else self.models[0]
        self.key_metric = f"{self._start(first)}knn_top1_k{20 if 20 in self.k else self.k[0]}"

    def result_names(self) -> list[str]:
        return [self._start(model) + name for model in self.models for name in self._names()]

    def _names(self) -> list[str]:
        return [f"knn_top{top}_k{k}" for k in self.k for top in _TOPS]

    def _start(self, model: str) -> str:
        """What the names of the results of ``model`` begin with."""
        return (f"{self.prefix}_" if self.prefix else "") + _PREFIXES[model]

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        named = backbones_of(model)
        backbones = [named[name] for name in self.models]
        train, train_labels = self._features(backbones, self.train_dataset, "k-NN: train features")
        val, val_labels = self._features(backbones, self.val_dataset, "k-NN: val features")
        if max(self.k) > len(train_labels):
            logger.warning("k-NN: only %d training images: a larger k uses them all", len(train_labels))
        train_labels, val_labels = _renumbered(train_labels, val_labels)
        results: dict[str, float] = {}
        for name, train_rows, val_rows in zip(self.models, train, val):
            # One model's copy at a time: votes need rows that are whole in memory.
            arrays = np.ascontiguousarray(train_rows), np.ascontiguousarray(val_rows)
            rates = self._rates(arrays[0], train_labels, arrays[1], val_labels)
            results.update({self._start(name) + key: rate for key, rate in rates.items()})
        return results

    def _rates(
        self, train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray
    ) -> dict[str, float]:
        """Each process counts the votes for its share of the validation rows."""
        _check_sets(train, train_labels, val)  # whole: an error of one process must be one of all
        share = np.array_split(np.arange(len(val)), distributed.world_size())[distributed.rank()]
        hits = dict.fromkeys(self._names(), 0)
        if len(share):
            val, val_labels = val[share[0] : share[-1] + 1], val_labels[share[0] : share[-1] + 1]
            for k, start, votes in _votes(train, train_labels, val, self.k, self.temperature):
                for top in _TOPS:
                    hits[f"knn_top{top}_k{k}"] += count_hits(votes, val_labels[start : start + len(votes)], top)
        counted = distributed.gather_objects((hits, len(share)))
        total = sum(rows for _, rows in counted)
        return {name: 100.0 * (sum(part[name] for part, _ in counted) / total) for name in hits}

    def _features(self, backbones: Sequence[nn.Layer], dataset: Any, title: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Those of each of ``backbones``, of rows of length 1, and the labels."""

        def features(images: paddle.Tensor) -> paddle.Tensor:
            rows = [normalize(backbone(images).astype("float32")) for backbone in backbones]
            return rows[0] if len(rows) == 1 else paddle.concat(rows, axis=1)

        rows, labels, _ = map_dataset(features, dataset, self.batch_size, title, num_workers=self.num_workers)
        return np.split(rows, len(backbones), axis=1), labels


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
    """All of :func:`knn_votes` at once: k -> votes [M, C] float64; the largest vote is the prediction."""
    collected: dict[int, np.ndarray] = {}
    for size, start, votes in knn_votes(train, train_labels, test, k, temperature):
        whole = collected.setdefault(size, np.empty((len(test), votes.shape[1])))
        whole[start : start + len(votes)] = votes
    return collected


def knn_votes(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Votes for each class: each of the k most similar training rows adds ``exp(similarity / temperature)`` to its
    class.

    Memory does not grow with the number of test rows.

    Args:
        train: [N, D] float32, rows of length 1; train_labels: [N] class indices from 0.
        test: [M, D], rows of length 1.

    Yields:
        For each chunk of B test rows and each k: k, the chunk's first row, and votes [B, C] float64, C = largest
        training label + 1.

    Raises:
        ValueError: an empty set, rows that are not finite, a k below 1, a temperature below 0.002, or a label
            that is negative or too large to have a column of votes for each class up to it.
    """
    _check(k, temperature)
    _check_sets(train, train_labels, test)
    yield from _votes(train, train_labels, test, k, temperature)


def _votes(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, k: Sequence[int], temperature: float
) -> Iterator[tuple[int, int, np.ndarray]]:
    """`knn_votes` of what was checked: a pass over all training rows is not for nothing."""
    num_classes = int(train_labels.max()) + 1
    for start, similarity, neighbours in nearest(train, test, min(max(k), len(train))):
        weights = np.exp(similarity.astype(np.float64) / temperature)
        # A part of the rows at a time: there may be as many classes as training images.
        step = max(1, _CHUNK_ELEMENTS // num_classes)
        for first in range(0, len(weights), step):
            part = slice(first, first + step)
            count = len(weights[part])
            cells = np.arange(count)[:, None] * num_classes + train_labels[neighbours[part]]
            for size in k:
                votes = np.bincount(cells[:, :size].ravel(), weights[part, :size].ravel(), count * num_classes)
                yield size, start + first, votes.reshape(count, num_classes)


def _renumbered(train_labels: np.ndarray, val_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same labels without gaps, as labels may be large ids; -1 for a class that no training image has."""
    classes, renumbered = np.unique(train_labels, return_inverse=True)
    places = np.searchsorted(classes, val_labels).clip(max=len(classes) - 1)
    return renumbered, np.where(classes[places] == val_labels, places, -1)


def _check_models(models: Sequence[str]) -> None:
    if not models or set(models) - set(_PREFIXES):
        raise ValueError(f"models ({list(models)}) must be one or more of {', '.join(_PREFIXES)}")


def _check(k: Sequence[int], temperature: float) -> None:
    if not k or min(k) < 1:
        raise ValueError(f"k ({list(k)}) must be one or more numbers above 0")
    if not temperature > 0:  # also NaN
        raise ValueError(f"temperature ({temperature}) must be positive")
    if temperature < _LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature ({temperature}) must be at least {_LOWEST_TEMPERATURE}: votes would be too large to count"
        )


def _check_sets(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray) -> None:
    if not len(train) or not len(test):
        raise ValueError(f"k-NN needs images: {len(train)} train, {len(test)} test")
    if train_labels.min() < 0:
        raise ValueError("k-NN needs a label for every training image")
    _check_finite(train, test)
    num_classes = int(train_labels.max()) + 1
    if num_classes > max(_MAX_CLASSES, len(train)):
        raise ValueError(
            f"the largest training label ({num_classes - 1}) would need as many columns of votes: number the classes "
            "from 0 without gaps"
        )


def _check_finite(train: np.ndarray, test: np.ndarray) -> None:
    for name, features in (("train", train), ("test", test)):
        with np.errstate(invalid="ignore", over="ignore"):
            broken = np.count_nonzero(~np.isfinite(features.sum(axis=1)))  # sums: no [N, D] of booleans
        if broken:
            raise ValueError(
                f"k-NN: {broken} of {len(features)} {name} feature rows are not finite (NaN or infinite): the weights "
                "are probably broken"
            )
