"""The loss of DINOv2 between the hidden patches of an image."""

from __future__ import annotations

import paddle
from paddle import Tensor

from passl.models.centering import CenteredLoss
from passl.models.functional import cross_entropy


class IBOTLoss(CenteredLoss):
    """Cross-entropy of what the student tells of hidden patches against what the teacher sees there (Zhou et al. 2022).

    Every image counts the same, however many of its patches are hidden; those without hidden patches count as zero.
    """

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, num_images: int, teacher_temp: float
    ) -> Tensor:
        """student_logits, teacher_logits: [M, K], of the hidden patches; weights: [M], 1/number of hidden patches in
        the patch's image; num_images: with and without hidden patches -> scalar.

        A single patch of weight 0 stands for none: it makes no loss, and does not count for the centre.
        """
        is_none = weights.shape[0] == 1 and weights.item() == 0
        targets = self.targets(teacher_logits, teacher_temp, counted=not is_none)
        with paddle.amp.auto_cast(enable=False):
            logits = student_logits.astype(targets.dtype) / self.student_temp
            return (cross_entropy(logits, targets) * weights.astype(targets.dtype)).sum() / num_images
