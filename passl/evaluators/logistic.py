"""Multinomial logistic regression on frozen features: the exact minimum, not the end of a training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import paddle
from paddle import nn

from passl import distributed
from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import Evaluator
from passl.evaluators.frozen_features import (
    check_labels,
    choices_for,
    extract_sets,
    how_to_use,
    save_probe,
)
from passl.evaluators.lbfgs import minimize
from passl.evaluators.linear_heads import LinearHeads
from passl.evaluators.names import check_file_name
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")


@EVALUATORS.register()
class LogisticRegression(Evaluator):
    """Top-1 and top-5 in percent, and cross-entropy, of a logistic regression on frozen features, as the protocols of
    SimCLR and CLIP have it: L-BFGS to the minimum, nothing to draw or to schedule.

    It minimises ``C * (sum of the cross-entropy) + (sum of squared weights) / 2``, as scikit-learn does; biases are
    free. (Of two classes scikit-learn has one weight vector, so that it takes twice this C there.)
    Written to the run's folder: `{file}.pdparams`, the classifier with the backbone as a LinearProbe.

    Args:
        train_dataset, val_dataset: labelled images, with the validation transform on both.
        C: the inverse strength of the penalty. Of several numbers the one is taken that does best on the part
            `hold_out` of the training images after training on the rest; with it, all training images are used. The
            validation images decide nothing.
        hold_out: share of the training images of each class, drawn from `seed`.
        standardize: divide each feature by its standard deviation over the training images, after taking off its mean;
            the saved classifier takes the features as they are.
        max_iterations, tolerance: stop after so many, or that close to the minimum, see `fit_logistic`.
        n_last_blocks, avgpool: as of LinearProbe.
        cache: see LinearSweep, with which it shares the files.
        file: what the names of files and results begin with.
    """

    def __init__(
        self,
        train_dataset: Any,
        val_dataset: Any,
        C: Union[float, Sequence[float]] = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0),  # noqa: N803 (its name everywhere)
        hold_out: float = 0.2,
        standardize: bool = False,
        max_iterations: int = 1000,
        tolerance: float = 1e-6,
        n_last_blocks: int = 1,
        avgpool: bool = False,
        seed: int = 0,
        cache: Union[bool, str] = False,
        file: str = "logistic",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        check_labels(train_dataset, val_dataset)
        check_batches(batch_size, num_workers)
        strengths = [C] if isinstance(C, (int, float)) else list(C)
        if not strengths or not all(0 < value < math.inf for value in strengths):
            raise ValueError(f"C ({C}) must be one or more numbers above 0")
        if not 0 < hold_out < 1:
            raise ValueError(f"hold_out ({hold_out}) must be above 0 and below 1, a share of the training images")
        if max_iterations < 1 or not tolerance > 0:
            raise ValueError(f"max_iterations ({max_iterations}) must be at least 1, tolerance ({tolerance}) above 0")
        if n_last_blocks < 1 or seed < 0:
            raise ValueError(f"n_last_blocks ({n_last_blocks}) must be at least 1, seed ({seed}) at least 0")
        check_file_name(file)
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.strengths = sorted(set(map(float, strengths)))
        self.hold_out = hold_out
        self.standardize = standardize
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.n_last_blocks = n_last_blocks
        self.avgpool = avgpool
        self.seed = seed
        self.cache = cache
        self.file = file
        self.key_metric = f"{file}_top1"
        self.batch_size = batch_size
        self.num_workers = num_workers

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        """`logistic_top1`, `logistic_top5` and `logistic_loss` on the validation images, and `logistic_C`;
        `logistic` is `file`.
        """
        (choice,) = choices_for(model, [self.n_last_blocks], [self.avgpool])
        train, val, num_classes = extract_sets(self, model, [choice], "logistic", output_dir)
        found = None
        if distributed.is_main():  # sums in another order could make processes choose differently
            rows = train.of(choice)
            strength = self._chosen(rows, train.labels, num_classes)
            weight, bias = self._fitted(rows, train.labels, num_classes, strength)
            head = LinearHeads([1.0], [0.0], weight, bias)
            rates, loss = head.rates(val.of(choice), val.labels, (1, 5))
            target = Path(output_dir) / f"{self.file}.pdparams"
            save_probe(model, weight, bias, target)
            options = how_to_use(target, choice, num_classes)
            logger.info("logistic: the classifier is kept as a LinearProbe, to be used with %s", options)
            found = {
                f"{self.file}_top1": float(rates[0, 0]),
                f"{self.file}_top5": float(rates[0, 1]),
                f"{self.file}_loss": float(loss[0]),
                f"{self.file}_C": strength,
            }
        return distributed.broadcast_object(found)

    def _chosen(self, rows: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
        """The C that does best on a part of the training images; of equals the one with the lower loss."""
        if len(self.strengths) == 1:
            return self.strengths[0]
        held = _held_out(labels, self.hold_out, self.seed)
        if not held.any() or held.all():
            middle = self.strengths[(len(self.strengths) - 1) // 2]
            logger.warning("logistic: too few images of each class to hold some out: C is %g", middle)
            return middle
        scores, start = [], None
        for strength in self.strengths:
            weight, bias = start = self._fitted(rows[~held], labels[~held], num_classes, strength, start)
            rates, loss = LinearHeads([1.0], [0.0], weight, bias).rates(rows[held], labels[held], (1,))
            scores.append((float(rates[0, 0]), -float(loss[0])))
            logger.info("logistic: C %-8g top1 %6.2f on held-out training images", strength, scores[-1][0])
        return self.strengths[scores.index(max(scores))]

    def _fitted(
        self, rows: np.ndarray, labels: np.ndarray, num_classes: int, strength: float, start: Optional[tuple] = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weight [W, C] and bias [C] for features as they are, float64; ``start``: some of another C."""
        mean, scale = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
        if self.standardize:
            mean, scale = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
            scale[scale == 0] = 1.0
        if start is not None:
            start = start[0] * scale[:, None], start[1] + mean @ start[0]
        weight, bias, is_done = fit_logistic(
            (rows - mean) / scale, labels, num_classes, strength, self.max_iterations, self.tolerance, start
        )
        if not is_done:
            logger.warning(
                "logistic: C %g: not at the minimum after %d iterations: raise max_iterations",
                strength,
                self.max_iterations,
            )
        weight = weight / scale[:, None]
        return weight, bias - mean @ weight


def fit_logistic(
    rows: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    strength: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    start: Optional[tuple[np.ndarray, np.ndarray]] = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The minimum of mean cross-entropy + squared weights / (2 * strength * N), in float64.

    The search goes on in coordinates in which the features are uncorrelated and the curvature is about the same in all
    directions: tens of steps in place of thousands, to the same minimum.

    Args:
        rows: [N, W]; labels: [N], from 0 to num_classes - 1.
        tolerance: of the gradient in these coordinates. As gradients are small far from the minimum where classes can
            be told apart without a mistake, the loss is also within a share of 100 * tolerance of the lowest.
        start: weight and bias; None: zeros.

    Returns:
        Weight [W, C], bias [C], and whether they are within ``tolerance``.
    """
    count = len(rows)
    penalty = 1.0 / (strength * count)
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = rows - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / count)
    # Of the cross-entropy of logits that are all equal the curvature is variance / C.
    sizes = np.sqrt(variances.clip(min=0) / num_classes + penalty)
    to_weight = axes / sizes
    function = _Objective(centred @ to_weight, labels, num_classes, penalty / sizes**2)
    matrix = np.zeros((rows.shape[1] + 1, num_classes))
    if start is not None:
        matrix[:-1], matrix[-1] = (axes * sizes).T @ start[0], start[1] + mean @ start[0]
    curvatures = np.zeros_like(matrix)
    curvatures[:-1] = function.penalties
    flat, is_done = minimize(function, matrix.ravel(), max_iterations, tolerance, curvatures.ravel())
    matrix = flat.reshape(matrix.shape)
    weight = to_weight @ matrix[:-1]
    return weight, matrix[-1] - mean @ weight, is_done


class _Objective:
    """Mean cross-entropy of ``rows`` [N, W] + squared weights * ``penalties`` [W] / 2, and its gradient, as a function
    of weight and bias in one flat array.
    """

    def __init__(self, rows: np.ndarray, labels: np.ndarray, num_classes: int, penalties: np.ndarray) -> None:
        self.rows = paddle.to_tensor(rows)
        self.target = paddle.to_tensor(np.eye(num_classes)[labels])
        self.penalties = penalties[:, None]

    @paddle.no_grad()
    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        matrix, count = flat.reshape(len(self.penalties) + 1, -1), len(self.rows)
        logits = paddle.matmul(self.rows, paddle.to_tensor(matrix[:-1])) + paddle.to_tensor(matrix[-1:])
        shifted = logits - logits.max(-1, keepdim=True)
        powers = shifted.exp()
        scale = powers.sum(-1, keepdim=True)
        loss = (scale.log().sum() - (shifted * self.target).sum()).item() / count
        slope = (powers / scale - self.target) / count
        of_penalty = self.penalties * matrix[:-1]
        of_weight = paddle.matmul(self.rows, slope, transpose_x=True).numpy() + of_penalty
        gradient = np.concatenate([of_weight, slope.sum(0, keepdim=True).numpy()])
        return loss + float((of_penalty * matrix[:-1]).sum()) / 2, gradient.ravel()


def _held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """[N] of booleans: ``share`` of each class, rounded down so that one is left to learn from."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        held[members[: min(math.ceil(share * len(members)), len(members) - 1)]] = True
    return held
