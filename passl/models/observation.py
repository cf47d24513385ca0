"""What one step of DINO or DINOv2 tells about itself: in these numbers a collapse shows long before evaluations do."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import paddle
from paddle import Tensor, nn

from passl import distributed
from passl.models.centering import sinkhorn_knopp
from passl.models.dino_loss import DINOLoss
from passl.models.functional import normalize, sum_columns, sum_rows

_SMALLEST = 1e-37  # probability with a logarithm; p ln p is 0 long before
_MAX_FEATURES = 512  # rows in the effective rank, whose cost grows with their cube


class Observation:
    """Keeps what the coming forward call computes, by hooks on the layers; of several calls, what the last one does.

    student, teacher: networks with a `head`, whose input are the features of the backbone.
    """

    def __init__(self, student: nn.Layer, teacher: nn.Layer, dino_loss: DINOLoss) -> None:
        self._center = dino_loss.center
        self._student_temp = dino_loss.student_temp
        self._centering = dino_loss.centering
        self._seen: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}
        self._logits: Optional[tuple[Tensor, Tensor]] = None
        self._used_center: Optional[Tensor] = None
        self._teacher_temp = math.nan
        self._handles = [
            student.head.register_forward_pre_hook(lambda _, inputs: self._keep_features("student", inputs[0])),
            teacher.head.register_forward_pre_hook(lambda _, inputs: self._keep_features("teacher", inputs[0])),
            dino_loss.register_forward_pre_hook(lambda _, inputs: self._keep_logits(*inputs)),
        ]

    def _keep_features(self, whose: str, features: Tensor) -> None:
        self._seen[whose] = features.detach()

    def _keep_logits(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> None:
        self._logits = student_logits.detach(), teacher_logits.detach()
        self._features = dict(self._seen)  # what goes through a head later is another loss's
        self._used_center = self._center.clone()  # it moves at the end of the step
        self._teacher_temp = teacher_temp

    @paddle.no_grad()
    def numbers(self) -> dict[str, float]:
        """What was kept, as numbers over the global batch; {} if there was no forward call. All processes call it."""
        if self._logits is None:
            return {}
        with paddle.amp.auto_cast(enable=False):
            return {
                "out_dim": self._logits[1].shape[1],
                "student_temp": self._student_temp,
                **self._logit_numbers(),
                **self._feature_numbers(),
            }

    def end(self) -> None:
        """Takes the hooks off the layers and lets go of what they kept."""
        for handle in self._handles:
            handle.remove()
        self._logits, self._used_center, self._features, self._seen = None, None, {}, {}

    def _logit_numbers(self) -> dict[str, float]:
        dtype = self._center.dtype
        student, teacher = self._logits
        rows, out_dim = teacher.shape
        student = student[:rows].astype(dtype) / self._student_temp  # the global views
        probabilities, entropies = self._answers(teacher.astype(dtype))
        # As in the loss, a view of the teacher meets the other view of the student.
        half = rows // 2
        swapped = paddle.concat([probabilities[half:], probabilities[:half]])
        swapped_entropies = paddle.concat([entropies[half:], entropies[:half]])
        divergences = _logsumexp(student)[0] - sum_columns(swapped * student) - swapped_entropies
        choices = np.bincount(probabilities.argmax(-1).numpy(), minlength=out_dim)
        sums = [
            sum_rows(probabilities),
            paddle.to_tensor(choices, dtype),
            entropies.sum().reshape([1]),
            divergences.sum().reshape([1]),
        ]
        total = distributed.all_reduce_sum_(paddle.concat([*sums, paddle.full([1], float(rows), dtype)])).numpy()
        total = total.astype(np.float64)
        count = total[-1]
        numbers = {
            "teacher_entropy": float(total[-3] / count),
            "teacher_mean_entropy": _entropy(total[:out_dim]),
            "student_teacher_kl": max(float(total[-2] / count), 0.0),
            "prototypes_in_use": int((total[out_dim : 2 * out_dim] > 0).sum()),
        }
        if self._centering == "softmax":
            numbers["center_norm"] = float(np.linalg.norm(self._used_center.numpy().astype(np.float64)))
        return numbers

    def _answers(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the teacher, as in the loss, [B, K], and the entropy of each, [B, 1]."""
        if self._centering == "sinkhorn":
            answers = sinkhorn_knopp(logits, self._teacher_temp)
            return answers, -sum_columns(answers * answers.clip(min=_SMALLEST).log())
        scaled = (logits - self._used_center) / self._teacher_temp
        logsum, exponentials = _logsumexp(scaled)
        answers = exponentials / sum_columns(exponentials)
        return answers, logsum - sum_columns(answers * scaled)

    def _feature_numbers(self) -> dict[str, float]:
        rows = self._logits[1].shape[0]
        numbers: dict[str, float] = {}
        for whose, prefix in (("teacher", ""), ("student", "student_")):
            features = normalize(self._features[whose][:rows].astype("float32"))
            mean = distributed.all_reduce_sum_(paddle.concat([sum_rows(features), paddle.full([1], float(rows))]))
            mean = mean.numpy().astype(np.float64)
            # Of vectors of length 1 the variance is 1 less the squared length of their mean.
            numbers[f"{prefix}feature_std"] = math.sqrt(max(1.0 - float(np.sum((mean[:-1] / mean[-1]) ** 2)), 0.0))
            if whose == "teacher":
                share = max(_MAX_FEATURES // distributed.world_size(), 1)
                numbers["effective_rank"] = effective_rank(distributed.gather_rows(features[:share].numpy()))
        return numbers


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the singular values of [n, D], scaled to sum 1 (Roy & Vetterli 2007): 1 to min(n, D), NaN
    where one is not finite.
    """
    matrix = features.astype(np.float64)
    if not np.isfinite(matrix).all():
        return math.nan
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None))
    total = values.sum()
    return math.exp(_entropy(values)) if total > 0 else 1.0


def _entropy(weights: np.ndarray) -> float:
    """Of the distribution that is proportional to `weights`, in nats."""
    shares = weights / weights.sum()
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _logsumexp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[B, K] -> log of the sum of exponentials [B, 1], exponentials [B, K] less the largest logit.

    Paddle's own is quadratic in K on a CPU, and its softmax has no values below exp(-64).
    """
    largest = logits.max(-1, keepdim=True)
    exponentials = (logits - largest).exp()
    return sum_columns(exponentials).log() + largest, exponentials
