"""What a guard looks at: how far a backbone's features have gone from those that it started with."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Protocol

import numpy as np
import paddle

from passl import distributed
from passl.config import ConfigError
from passl.data.batches import load_batch
from passl.engine.evaluation import Measuring
from passl.engine.guard import Guard
from passl.engine.trainer import Trainer
from passl.evaluators import KNN, Evaluator

_PROBE = 0x70726F62  # beside the seed, where the views of an epoch have the epoch: no epoch is as large
_BATCH = 32


class Watch(Protocol):
    """Measures a trainer's backbone and judges it by a state of plain numbers and text, which checkpoints keep.

    The state has `value`, what was measured; `damage`, which a guard compares with its limit; and `coming`, the damage
    that is to be expected if training goes on however slowly. Numbers may differ between processes: only the first
    one's count.

    Attributes:
        name: of the value.
    """

    name: str

    def begin(self, trainer: Trainer) -> dict[str, Any]:
        """The state of the features that the run starts with."""
        ...

    def measure(self, trainer: Trainer, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state after a measurement; ``state`` is the one before."""
        ...


class KNNWatch:
    """k-NN accuracy of the teacher, in percent. Its damage: points below the best one, the start's included.

    Args:
        measuring: with a KNN of the teacher alone.
        records: whether to write its numbers, because nobody else does.
    """

    def __init__(self, measuring: Measuring, records: bool) -> None:
        self.measuring = measuring
        self.records = records
        self.name = measuring.evaluators[0].key_metric

    def begin(self, trainer: Trainer) -> dict[str, Any]:
        value = self.measuring.run(trainer)[self.name]
        return {"start": value, "best": value, "value": value, "damage": 0.0, "coming": 0.0}

    def measure(self, trainer: Trainer, state: Mapping[str, Any]) -> dict[str, Any]:
        results = self.measuring.run(trainer)
        if self.records:
            self.measuring.record(trainer, results)
        value = results[self.name]
        best = max(state["best"], value)
        return {**state, "best": best, "value": value, "damage": best - value, "coming": best - value}


class DriftWatch:
    """Mean of 1 - cosine similarity between the teacher's features of the same images now and at the start: 0 to 2. It
    needs no labels, and is its own damage. The student's, where it is larger, is still to come: the teacher follows.

    The images are one global view each of samples from the whole of the training data, drawn once and for all. Their
    first features are kept in the state, so that a resumed run compares with the same.

    Args:
        num_images: fewer if the data set has not so many.
    """

    name = "drift"

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._images: Optional[np.ndarray] = None  # [num_images, C, H, W]

    def begin(self, trainer: Trainer) -> dict[str, Any]:
        first = {}
        if distributed.is_main():
            features = self._present_features(trainer, self.num_images)
            first = {name: encoded(rows) for name, rows in features.items()}
            first = {"num_images": len(features["teacher"]), "features": first}
        return self.measure(trainer, distributed.broadcast_object(first))

    def measure(self, trainer: Trainer, state: Mapping[str, Any]) -> dict[str, Any]:
        if not distributed.is_main():
            return dict(state)
        features = self._present_features(trainer, state["num_images"])
        firsts = {name: decoded(text, state["num_images"]) for name, text in state["features"].items()}
        drift = {name: float(1.0 - (rows * firsts[name]).sum(axis=1).mean()) for name, rows in features.items()}
        return {**state, "value": drift["teacher"], "damage": drift["teacher"], "coming": max(drift.values())}

    def _present_features(self, trainer: Trainer, num_images: int) -> dict[str, np.ndarray]:
        """Of each backbone of the method [num_images, D], rows of length 1."""
        if self._images is None:
            self._images = probe_images(trainer.loader.dataset, num_images, trainer.seed)
        features = {}
        is_half = trainer.precision.level == "O2"
        with paddle.no_grad(), trainer.precision.autocast() if is_half else contextlib.nullcontext():
            for name, backbone in trainer.method.backbones().items():
                backbone.eval()
                rows = [
                    backbone(paddle.to_tensor(self._images[start : start + _BATCH])).astype("float32").numpy()
                    for start in range(0, len(self._images), _BATCH)
                ]
                features[name] = unit_rows(np.concatenate(rows))
        trainer.method.train()
        return features


def probe_images(dataset: Any, num_images: int, seed: int) -> np.ndarray:
    """The first view of each of ``num_images`` samples (or all) at even distances: [num_images, C, H, W].

    Raises:
        ValueError: none of the samples can be read.
    """
    pool = np.arange(len(dataset)) if dataset.pool is None else dataset.pool
    chosen = pool[np.linspace(0, len(pool) - 1, min(num_images, len(pool))).round().astype(np.int64)]
    arrays = load_batch(dataset, [(_PROBE, int(index)) for index in chosen], seed).arrays
    if arrays is None:
        raise ValueError("Global.guard: too many unreadable images among those whose features are to be watched")
    views = arrays["global_crops"] if "global_crops" in arrays else arrays["image"]
    # View by view: the first of all samples come first. A copy, so that the other views go.
    return np.array(views[: len(chosen)])


def unit_rows(features: np.ndarray) -> np.ndarray:
    """``features`` [N, D] in float64, rows at length 1."""
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def encoded(features: np.ndarray) -> str:
    """[N, D] in half precision as text, which every checkpoint can hold."""
    return base64.b64encode(features.astype("<f2").tobytes()).decode("ascii")


def decoded(text: str, num_images: int) -> np.ndarray:
    """The features [N, D] of ``encoded``, rows at length 1."""
    return unit_rows(np.frombuffer(base64.b64decode(text), "<f2").reshape(num_images, -1))


# --- which one ---


def chosen_watch(
    guard: Guard,
    evaluators: Sequence[Evaluator],
    is_evaluated: bool,
    deciding: Optional[Measuring],
    measuring: Callable[[list[Evaluator]], Measuring],
) -> tuple[Watch, list[Evaluator]]:
    """What ``guard`` looks at, and those of ``evaluators`` that it leaves to others.

    Args:
        is_evaluated: whether the run has evaluators at all.
        deciding: what early stopping measures, where there is that.
        measuring: makes a Measuring.

    Raises:
        ConfigError: no evaluator measures the teacher by k-NN; the text says what to change.
    """
    if guard.metric == "drift":
        return DriftWatch(guard.num_images), list(evaluators)
    if deciding is not None:
        return KNNWatch(deciding, records=False), list(evaluators)
    watched = _knn_of_teacher(evaluators, is_evaluated)
    return KNNWatch(measuring([watched]), records=True), [one for one in evaluators if one is not watched]


def _knn_of_teacher(evaluators: Sequence[Evaluator], is_evaluated: bool) -> KNN:
    if not is_evaluated:
        raise ConfigError(
            ["Global.guard: metric knn needs evaluation: set Global.eval_during_train: true, or metric: drift"]
        )
    for evaluator in evaluators:
        if isinstance(evaluator, KNN) and "teacher" in evaluator.models:
            return evaluator
    raise ConfigError(
        [
            "Global.guard: metric knn needs a KNN of the teacher in Evaluators. Add {name: KNN, train_dataset: ..., "
            "val_dataset: ...}, or set metric: drift, which needs no labels"
        ]
    )
