"""The targets that a teacher's logits make: sharpened, and kept from being the same for all images."""

from __future__ import annotations

import math
from typing import Literal, Optional

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.distributed import all_gather, all_reduce_sum_
from passl.models.functional import on_cpu, sum_columns, sum_rows

Centering = Literal["softmax", "sinkhorn"]
CENTERINGS = ("softmax", "sinkhorn")


class CenteredLoss(nn.Layer):
    """Base of the losses against a teacher; `center` [1, K] is the running mean of its logits over the global batch.

    It changes in `update_center` only, never in `forward`, and stays zero with Sinkhorn-Knopp, which needs none.
    """

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: Centering = "softmax",
    ) -> None:
        super().__init__()
        if not student_temp > 0:
            raise ValueError(f"student_temp ({student_temp}) must be positive")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum ({center_momentum}) must be in [0, 1]")
        if centering not in CENTERINGS:
            raise ValueError(f"centering ({centering!r}) must be one of {', '.join(CENTERINGS)}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.centering = centering
        self.register_buffer("center", paddle.zeros([1, out_dim]))
        self._teacher_sum: Optional[Tensor] = None  # [K], over the views and forward calls since the last update
        self._teacher_rows = 0

    @paddle.no_grad()
    def targets(self, teacher_logits: Tensor, teacher_temp: float, counted: bool = True) -> Tensor:
        """[B, K] -> the probabilities [B, K] that the student is to predict, in the precision of the centre.

        counted: False of logits that are there only because all processes must call it, equally often with
        Sinkhorn-Knopp and at least once between two updates of a centre: then they have no part in either.
        """
        if not teacher_temp > 0:
            raise ValueError(f"teacher_temp ({teacher_temp}) must be positive")
        teacher_logits = teacher_logits.astype(self.center.dtype)  # full precision, also of half-precision logits
        with paddle.amp.auto_cast(enable=False):
            if self.centering == "sinkhorn" and counted:
                return sinkhorn_knopp(teacher_logits, teacher_temp)
            if self.centering == "sinkhorn":
                sinkhorn_knopp(paddle.zeros([0, teacher_logits.shape[1]], teacher_logits.dtype), teacher_temp)
                return F.softmax(teacher_logits / teacher_temp, axis=-1)
            if self.training:
                total = teacher_logits.sum(0) if counted else paddle.zeros_like(teacher_logits[0])
                self._teacher_sum = total if self._teacher_sum is None else self._teacher_sum + total
                self._teacher_rows += teacher_logits.shape[0] if counted else 0
            return F.softmax((teacher_logits - self.center) / teacher_temp, axis=-1)

    def forget(self) -> None:
        """The teacher's logits since the last update do not count."""
        self._teacher_sum = None
        self._teacher_rows = 0

    @paddle.no_grad()
    def update_center(self) -> None:
        """Moves the centre towards the mean of all teacher logits since the last call, over all processes; without any
        it stays. The official code of DINOv2 does it at its next call of the loss, which has the same effect.
        """
        if self._teacher_sum is None:
            return
        # Every row counts the same. Of hidden patches processes have unequal numbers: the official code takes the mean
        # of their means there, and so a centre that depends on how the images are shared out.
        rows = paddle.full([1], float(self._teacher_rows), dtype=self._teacher_sum.dtype)
        total = all_reduce_sum_(paddle.concat([self._teacher_sum, rows]))
        mean = paddle.where(total[-1] > 0, total[:-1] / total[-1].clip(min=1.0), self.center[0])
        self.center.set_value(self.center * self.center_momentum + mean * (1.0 - self.center_momentum))
        self.forget()


@paddle.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments [B, K] of rows that sum to 1, spread evenly over the prototypes (Caron et al. 2020; as in DINOv2).

    logits: [B, K] of this process; the rows of all processes, which may have unequal numbers of them, some of them
    none, are spread together. All processes must call it. Computed, and returned, in float32 at least.
    """
    if iterations < 1:
        raise ValueError(f"iterations ({iterations}) must be at least 1")
    scaled = (logits if logits.dtype == paddle.float64 else logits.astype("float32")) / temperature
    num_rows, num_columns = scaled.shape
    total_rows = all_reduce_sum_(paddle.full([1], float(num_rows), scaled.dtype))
    lowest = paddle.full([2], float(paddle.finfo(scaled.dtype).min), scaled.dtype)
    ends = all_gather(paddle.stack([-scaled.min(), scaled.max()]) if num_rows else lowest).max(0)
    if not ends.sum().item() <= _WIDEST[scaled.dtype]:
        spread = _spread_by_logarithms(scaled.astype("float64"), total_rows.astype("float64"), iterations)
        return spread.astype(scaled.dtype)
    # Without the shift, which the first division takes back, large logits would overflow.
    scores = (scaled - ends[1]).exp_() if num_rows else scaled  # 2.6 computes nothing of nothing
    # Every division is by one factor for each row or column, so that the large matrix is only read.
    rows, columns = paddle.ones([num_rows, 1], scores.dtype), paddle.zeros([1, num_columns], scores.dtype)
    for _ in range(iterations):
        own = _rows_sum(scores, rows) if num_rows else paddle.zeros_like(columns)
        columns = 1.0 / (all_reduce_sum_(own) * num_columns)
        if num_rows:
            rows = 1.0 / (_columns_sum(scores, columns) * total_rows)
    return scores.multiply_(columns).multiply_(rows * total_rows) if num_rows else scaled


# Between the largest and the smallest scaled logit: exponentials further apart, and less by the divisions, leave the
# range of their type. Cosines at a temperature of 0.04 are 50 apart at most.
_WIDEST = {paddle.float32: 60.0, paddle.float64: 600.0}


def _rows_sum(x: Tensor, factors: Tensor) -> Tensor:
    """[B, K], a factor for each row [B, 1] -> [1, K]"""
    # On other devices matrix products may round to half precision.
    return paddle.matmul(factors, x, transpose_x=True) if on_cpu(x) else (x * factors).sum(0, keepdim=True)


def _columns_sum(x: Tensor, factors: Tensor) -> Tensor:
    """[B, K], a factor for each column [1, K] -> [B, 1]"""
    return paddle.matmul(x, factors, transpose_y=True) if on_cpu(x) else (x * factors).sum(1, keepdim=True)


def _spread_by_logarithms(scores: Tensor, total_rows: Tensor, iterations: int) -> Tensor:
    """The same for any logits, several times slower: where exponentials are 0, rows, or prototypes that no row comes
    near, have nothing to divide. scores: logarithms [B, K], total_rows: [1] -> [B, K]
    """
    num_rows, num_columns = scores.shape
    none = paddle.zeros([num_columns], scores.dtype)
    log_rows, log_columns = total_rows.log(), math.log(num_columns)
    for _ in range(iterations):
        largest = all_gather(scores.max(0) if num_rows else none - math.inf).max(0)
        own = sum_rows((scores - largest).exp()) if num_rows else none.clone()
        columns = largest + all_reduce_sum_(own).log() + log_columns
        if num_rows:
            scores = scores - columns
            largest = scores.max(1, keepdim=True)
            scores = scores - (largest + sum_columns((scores - largest).exp()).log() + log_rows)
    return (scores + log_rows).exp() if num_rows else scores
