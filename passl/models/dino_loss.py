"""The loss of DINO, which is that of DINOv2 between whole images too."""

from __future__ import annotations

import paddle
from paddle import Tensor

from passl.models.centering import CenteredLoss
from passl.models.functional import cross_entropy


class DINOLoss(CenteredLoss):
    """Cross-entropy of the student against the centred, sharpened teacher (Caron et al. 2021, eq. 1 to 4).

    Averaged over all pairs of a teacher view and another student view. `center` [1, K] is the running mean of the
    teacher's logits over the global batch; it changes in `update_center` only, never in `forward`.
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """student_logits: [V*B, K], the two global views first; teacher_logits: [2*B, K] -> scalar."""
        views = _num_views(student_logits.shape[0], teacher_logits.shape[0])
        first, second = self.targets(teacher_logits, teacher_temp).chunk(2)
        with paddle.amp.auto_cast(enable=False):
            # Each student view meets the teacher views other than itself: view 0 the second, view 1 the first, the
            # rest both. Cross-entropy is linear in its targets: theirs are summed, and each view is met once.
            targets = paddle.concat([second, first] + [first + second] * (views - 2))
            logits = student_logits.astype(targets.dtype) / self.student_temp
            num_pairs = 2 * views - 2
            return cross_entropy(logits, targets).sum() / (num_pairs * first.shape[0])


def _num_views(student_rows: int, teacher_rows: int) -> int:
    batch = teacher_rows // 2
    if batch == 0 or teacher_rows % 2 or student_rows < teacher_rows or student_rows % batch:
        raise ValueError(
            f"student_logits has {student_rows} rows and teacher_logits {teacher_rows}: "
            "expected V*B and 2*B, for B images and V >= 2 views"
        )
    return student_rows // batch
