"""DINO as a method: a student that learns to agree with its own moving average."""

from __future__ import annotations

import logging
import math
from typing import Callable

import paddle
from paddle import Tensor, nn

from passl import distributed
from passl.models.dino_loss import DINOLoss
from passl.models.distillation import SelfDistillation, crops_of, drop_gradients, follow, zero_of
from passl.models.layer_rates import layer_rates
from passl.registry import METHODS
from passl.schedules import Duration, Schedule, Timeline

logger = logging.getLogger("passl")


@METHODS.register()
class DINO(SelfDistillation):
    """Self-distillation with no labels (Caron et al. 2021).

    backbone, head: builders; the backbone has `embed_dim`, the head takes `in_dim` and has `out_dim` and `last_layer`.
    freeze_last_layer: for so many epochs the head's last layer is not trained.
    freeze_backbone: for so long (epochs, or "500it", "5%") only the heads are trained. Both backbones, which then start
        from given weights, stay as they are to the last bit, with the running statistics of their batch norms.
    backbone_lr: the student's backbone takes this share of the learning rate, ...
    layer_decay: ... and its layers the less of it, the deeper they are: see `layer_rates`. The heads take all.
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Layer],
        head: Callable[..., nn.Layer],
        freeze_last_layer: int = 1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        freeze_backbone: Duration = 0,
        backbone_lr: float = 1.0,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < backbone_lr < math.inf:
            raise ValueError(
                f"backbone_lr ({backbone_lr}) must be above 0, a share of the learning rate; freeze_backbone keeps the "
                "backbone as it is"
            )
        try:
            Timeline(1, 1).steps(freeze_backbone)
        except ValueError as error:
            raise ValueError(f"freeze_backbone: {error}") from error
        self._build(backbone, head)
        layer_rates(self.student.backbone, layer_decay)  # refuses what does not fit
        self.dino_loss = DINOLoss(self.student.head.out_dim, student_temp, center_momentum)
        self.freeze_last_layer = freeze_last_layer
        self.freeze_backbone = freeze_backbone
        self.backbone_lr = backbone_lr
        self.layer_decay = layer_decay

    def learning_rate_shares(self) -> dict[str, float]:
        """Those of the student's backbone, by backbone_lr and layer_decay."""
        if self.backbone_lr == self.layer_decay == 1:
            return {}
        rates = layer_rates(self.student.backbone, self.layer_decay)
        return {f"student.backbone.{name}": self.backbone_lr * rate for name, rate in rates.items()}

    def schedules(self, timeline: Timeline) -> dict[str, Schedule]:
        """backbone_frozen: 1 in the steps of freeze_backbone, then 0; none if it is 0."""
        steps = timeline.steps(self.freeze_backbone)
        if steps == 0:
            return {}
        logger.info("the backbone stays as it is in the first %d of %d steps", steps, timeline.total_steps)
        return {"backbone_frozen": lambda step: float(step < steps)}

    def forward(self, batch: dict[str, Tensor], teacher_temp: float, backbone_frozen: float = 0.0) -> dict[str, Tensor]:
        """batch: "global_crops" [2*B, C, H, W] and, if there are any, "local_crops" [n*B, C, h, w], view by view.

        backbone_frozen: not 0 in the steps in which only the heads are trained.
        """
        crops = crops_of(batch, "DINO")
        for network in (self.student, self.teacher):
            network.freeze(backbone_frozen > 0)
        with paddle.no_grad():
            teacher_logits = self.teacher(crops[:1])
        loss = self.dino_loss(self.student(crops), teacher_logits, teacher_temp)
        if self.student.frozen and distributed.world_size() > 1:
            loss = loss + zero_of(self.student.backbone, loss.dtype)
        return {"loss": loss}

    def after_backward(self, epoch: int) -> None:
        """Drops the gradients of the student's last layer in the first epochs, and those of a frozen backbone."""
        if epoch < self.freeze_last_layer:
            drop_gradients(self.student.head.last_layer)
        if self.student.frozen:
            drop_gradients(self.student.backbone)

    def after_skipped_step(self) -> None:
        self.dino_loss.forget()

    def after_step(self, teacher_momentum: float) -> None:
        """Updates the centre, and moves the teacher's parameters (not its buffers) towards the student's."""
        self.dino_loss.update_center()
        # Of a run that goes on with a frozen backbone, the teacher's may be another than the student's.
        teacher, student = (n.head if self.student.frozen else n for n in (self.teacher, self.student))
        follow(teacher, student, teacher_momentum)
