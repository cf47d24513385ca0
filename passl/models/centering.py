"""The targets that a teacher's logits make: sharpened, and kept from being the same for all images."""

from __future__ import annotations

from typing import Literal, Optional

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.distributed import all_gather, all_reduce_sum_
from passl.models.functional import sum_columns, sum_rows

Centering = Literal["softmax", "sinkhorn"]
CENTERINGS = ("softmax", "sinkhorn")


class CenteredLoss(nn.Layer):
    """Base of the losses against a teacher; `center` [1, K] is the running mean of its logits over the global batch.

    It changes in `update_center` only, never in `forward`, and stays zero with Sinkhorn-Knopp, which needs none.
    """

    def __init__(self, out_dim: int, student_temp: float, center_momentum: float, centering: Centering) -> None:
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

        In training the logits count for the next centre, unless they are there only because all processes must call it:
        equally often with Sinkhorn-Knopp, and at least once between two updates of a centre.
        """
        if not teacher_temp > 0:
            raise ValueError(f"teacher_temp ({teacher_temp}) must be positive")
        teacher_logits = teacher_logits.astype(self.center.dtype)  # full precision, also of half-precision logits
        with paddle.amp.auto_cast(enable=False):
            if self.centering == "sinkhorn":
                return sinkhorn_knopp(teacher_logits, teacher_temp)
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
        it stays.
        """
        if self._teacher_sum is None:
            return
        rows = paddle.full([1], float(self._teacher_rows), dtype=self._teacher_sum.dtype)
        total = all_reduce_sum_(paddle.concat([self._teacher_sum, rows]))
        mean = paddle.where(total[-1] > 0, total[:-1] / total[-1].clip(min=1.0), self.center[0])
        self.center.set_value(self.center * self.center_momentum + mean * (1.0 - self.center_momentum))
        self.forget()


@paddle.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments [B, K] of rows that sum to 1, spread evenly over the prototypes (Caron et al. 2020; as in DINOv2).

    logits: [B, K] of this process; the rows of all processes are spread together.
    """
    num_rows, num_columns = logits.shape
    scaled = logits / temperature
    # Without the shift, which the first division takes back, large logits would overflow.
    scores = (scaled - all_gather(scaled.max().reshape([1])).max()).exp()
    smallest = float(paddle.finfo(logits.dtype).tiny)  # a prototype that no row comes near has nothing to divide
    total_rows = all_reduce_sum_(paddle.full([1], float(num_rows), logits.dtype))
    scores = scores / all_reduce_sum_(scores.sum().reshape([1]))
    for _ in range(iterations):
        of_prototypes = all_reduce_sum_(sum_rows(scores)).clip(min=smallest)
        scores = scores / (of_prototypes * num_columns)
        scores = scores / (sum_columns(scores).clip(min=smallest) * total_rows)
    return scores * total_rows
