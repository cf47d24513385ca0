"""The loss of DINO and its running centre."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.distributed import all_reduce_sum_
from passl.models.functional import cross_entropy


class DINOLoss(nn.Layer):
    """Cross-entropy of the student against the centred, sharpened teacher (Caron et al. 2021, eq. 1 to 4).

    Averaged over all pairs of a teacher view and another student view. `center` [1, K] is the running mean of the
    teacher's logits over the global batch; it changes in `update_center` only, never in `forward`.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        if not student_temp > 0:
            raise ValueError(f"student_temp ({student_temp}) must be positive")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum ({center_momentum}) must be in [0, 1]")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", paddle.zeros([1, out_dim]))
        self._teacher_sum: Tensor | None = None  # [K], over the views and forward calls since the last update
        self._teacher_rows = 0

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """student_logits: [V*B, K], the two global views first; teacher_logits: [2*B, K] -> scalar."""
        if not teacher_temp > 0:
            raise ValueError(f"teacher_temp ({teacher_temp}) must be positive")
        views = _num_views(student_logits.shape[0], teacher_logits.shape[0])
        dtype = self.center.dtype  # full precision, also of half-precision logits
        student_logits, teacher_logits = student_logits.astype(dtype), teacher_logits.detach().astype(dtype)
        if self.training:
            self._accumulate(teacher_logits)
        with paddle.amp.auto_cast(enable=False):
            first, second = F.softmax((teacher_logits - self.center) / teacher_temp, axis=-1).chunk(2)
            # Each student view meets the teacher views other than itself: view 0 the second, view 1 the first, the
            # rest both. Cross-entropy is linear in its targets: theirs are summed, and each view is met once.
            targets = paddle.concat([second, first] + [first + second] * (views - 2))
            num_pairs = 2 * views - 2
            return cross_entropy(student_logits / self.student_temp, targets).sum() / (num_pairs * first.shape[0])

    @paddle.no_grad()
    def _accumulate(self, teacher_logits: Tensor) -> None:
        total = teacher_logits.sum(0)
        self._teacher_sum = total if self._teacher_sum is None else self._teacher_sum + total
        self._teacher_rows += teacher_logits.shape[0]

    def forget(self) -> None:
        """The teacher's logits since the last update do not count."""
        self._teacher_sum = None
        self._teacher_rows = 0

    @paddle.no_grad()
    def update_center(self) -> None:
        """Moves the centre towards the mean of all teacher logits since the last call, over all processes."""
        if self._teacher_sum is None:
            return
        rows = paddle.full([1], float(self._teacher_rows), dtype=self._teacher_sum.dtype)
        total = all_reduce_sum_(paddle.concat([self._teacher_sum, rows]))
        mean = total[:-1] / total[-1]
        self.center.set_value(self.center * self.center_momentum + mean * (1.0 - self.center_momentum))
        self.forget()


def _num_views(student_rows: int, teacher_rows: int) -> int:
    batch = teacher_rows // 2
    if batch == 0 or teacher_rows % 2 or student_rows < teacher_rows or student_rows % batch:
        raise ValueError(
            f"student_logits has {student_rows} rows and teacher_logits {teacher_rows}: "
            "expected V*B and 2*B, for B images and V >= 2 views"
        )
    return student_rows // batch
