"""DINOv2 as a method: DINO, its likeness between patches (iBOT), and features that keep apart (KoLeo)."""

from __future__ import annotations

from typing import Callable, Optional

import paddle
from paddle import Tensor, nn

from passl.models.centering import Centering
from passl.models.dino_loss import DINOLoss
from passl.models.dinov2.ibot_loss import IBOTLoss
from passl.models.dinov2.koleo_loss import koleo_loss
from passl.models.distillation import SelfDistillation, crops_of, drop_gradients, follow, start_equal
from passl.models.layer_rates import layer_rates
from passl.models.layers import in_full_precision
from passl.registry import METHODS


@METHODS.register()
class DINOv2(SelfDistillation):
    """DINOv2 (Oquab et al. 2023): DINO between views, iBOT between hidden patches, KoLeo between images.

    backbone, head: builders, as those of DINO. Backbones without `forward_crops` can do without hidden patches only.
    ibot_head: builder of a head of the patches' own; None: they share that of the views.
    freeze_last_layer: for so many epochs the heads' last layers are not trained.
    centering: how the teacher is kept from collapse, by a running "softmax" centre or by "sinkhorn" (Sinkhorn-Knopp).
    dino_loss_weight, ibot_loss_weight, koleo_loss_weight: 0 leaves a loss out.
    layer_decay: the deeper a layer of the backbone is, the less of the learning rate it takes (`layer_rates`) ...
    patch_embed_lr: ... and the patch embedding so much of that again.
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Layer],
        head: Callable[..., nn.Layer],
        ibot_head: Optional[Callable[..., nn.Layer]] = None,
        freeze_last_layer: int = 1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: Centering = "softmax",
        dino_loss_weight: float = 1.0,
        ibot_loss_weight: float = 1.0,
        koleo_loss_weight: float = 0.1,
        layer_decay: float = 0.9,
        patch_embed_lr: float = 0.2,
    ) -> None:
        super().__init__()
        self._build(backbone, head)
        self._hides_patches = ibot_loss_weight > 0
        if ibot_head is not None:
            in_dim = self.student.backbone.embed_dim
            self.student_ibot_head, self.teacher_ibot_head = ibot_head(in_dim=in_dim), ibot_head(in_dim=in_dim)
            start_equal(self.teacher_ibot_head, self.student_ibot_head)
        self._has_ibot_head = ibot_head is not None
        self.dino_loss = DINOLoss(self.student.head.out_dim, student_temp, center_momentum, centering)
        if self._hides_patches:
            if getattr(self.student.backbone, "mask_token", None) is None:
                raise ValueError(
                    f"{type(self.student.backbone).__name__} has no mask token to stand for hidden patches: a backbone "
                    "with mask_token: true, or ibot_loss_weight: 0"
                )
            self.student.backbone.mask_token.stop_gradient = False
            self.ibot_loss = IBOTLoss(self._ibot_heads()[0].out_dim, student_temp, center_momentum, centering)
        self.freeze_last_layer = freeze_last_layer
        self.loss_weights = {"dino": dino_loss_weight, "ibot": ibot_loss_weight, "koleo": koleo_loss_weight}
        self.layer_decay = layer_decay
        self.patch_embed_lr = patch_embed_lr
        self.learning_rate_shares()  # refuses what does not fit

    def _ibot_heads(self) -> tuple[nn.Layer, nn.Layer]:
        """The student's and the teacher's head for patches."""
        if self._has_ibot_head:
            return self.student_ibot_head, self.teacher_ibot_head
        return self.student.head, self.teacher.head

    def learning_rate_shares(self) -> dict[str, float]:
        """Those of the student's backbone, by layer_decay and patch_embed_lr."""
        rates = layer_rates(self.student.backbone, self.layer_decay)
        return {
            f"student.backbone.{name}": rate * (self.patch_embed_lr if name.startswith("patch_embed.") else 1.0)
            for name, rate in rates.items()
        }

    def forward(self, batch: dict[str, Tensor], teacher_temp: float) -> dict[str, Tensor]:
        """batch: "global_crops" [2*B, C, H, W]; if there are any, "local_crops" [n*B, C, h, w]; and "masks", bool
        [2*B, N], the patches of the global crops that are hidden from the student. View by view.
        """
        crops = crops_of(batch, "DINOv2")
        masks = self._masks(batch)
        student_tokens = self._tokens(self.student.backbone, crops, masks)
        with paddle.no_grad():
            teacher_tokens = self._tokens(self.teacher.backbone, crops[:1], None)[0]
            teacher_logits = in_full_precision(self.teacher.head, teacher_tokens[:, 0])
        student_cls = [tokens[:, 0] for tokens in student_tokens]
        student_logits = in_full_precision(self.student.head, paddle.concat(student_cls))
        losses = {"dino": self.dino_loss(student_logits, teacher_logits, teacher_temp)}
        losses["koleo"] = sum(koleo_loss(view) for view in student_cls[0].chunk(2))
        if self._hides_patches:
            losses["ibot"] = self._patch_loss(student_tokens[0], teacher_tokens, masks, teacher_temp)
        total = sum(self.loss_weights[name] * loss for name, loss in losses.items())
        return {"loss": total, **{f"{name}_loss": loss for name, loss in losses.items()}}

    def _masks(self, batch: dict[str, Tensor]) -> Optional[Tensor]:
        if not self._hides_patches:
            return None
        if "masks" not in batch:
            raise ValueError(
                "DINOv2 needs 'masks', the patches to hide from the student: give DataLoader.Train the batch_transform "
                "BlockMasks, or the model ibot_loss_weight: 0"
            )
        return batch["masks"].astype("bool")

    def _tokens(self, backbone: nn.Layer, crops: list[Tensor], masks: Optional[Tensor]) -> list[Tensor]:
        """[B_i, T_i, D] of each batch of crops, [CLS] first; T is 1 of backbones that give nothing else."""
        if hasattr(backbone, "forward_crops"):
            return backbone.forward_crops(crops, [masks] + [None] * (len(crops) - 1))
        return [backbone(batch).unsqueeze(1) for batch in crops]

    def _patch_loss(self, student: Tensor, teacher: Tensor, masks: Tensor, teacher_temp: float) -> Tensor:
        """student, teacher: [2*B, T, D], masks: [2*B, N]"""
        num_prefix = student.shape[1] - masks.shape[1]
        indices, weights = hidden_patches(masks)
        student_head, teacher_head = self._ibot_heads()
        student_logits, teacher_logits = (
            in_full_precision(head, tokens[:, num_prefix:].flatten(0, 1).index_select(indices))
            for head, tokens in ((student_head, student), (teacher_head, teacher))
        )
        return self.ibot_loss(student_logits, teacher_logits.detach(), weights, masks.shape[0], teacher_temp)

    def after_backward(self, epoch: int) -> None:
        """Drops the gradients of the student's last layers in the first epochs."""
        if epoch < self.freeze_last_layer:
            drop_gradients(self.student.head.last_layer)
            if self._has_ibot_head:
                drop_gradients(self.student_ibot_head.last_layer)

    def after_skipped_step(self) -> None:
        for loss in self._losses():
            loss.forget()

    def after_step(self, teacher_momentum: float) -> None:
        """Updates the centres, and moves the teacher's parameters (not its buffers) towards the student's."""
        for loss in self._losses():
            loss.update_center()
        follow(self.teacher, self.student, teacher_momentum)
        if self._has_ibot_head:
            follow(self.teacher_ibot_head, self.student_ibot_head, teacher_momentum)

    def _losses(self) -> list[nn.Layer]:
        return [self.dino_loss] + ([self.ibot_loss] if self._hides_patches else [])


def hidden_patches(masks: Tensor) -> tuple[Tensor, Tensor]:
    """masks: bool [B, N] -> the flat indices [M] of what is hidden, and the weights [M], 1/number hidden in its image.

    Where nothing is hidden it is one patch of weight 0, for every head has to take part in every step.
    """
    indices = masks.flatten().nonzero().flatten()
    if indices.shape[0] == 0:
        return paddle.zeros([1], "int64"), paddle.zeros([1])
    counts = masks.astype("float32").sum(1)
    return indices, 1.0 / counts.index_select(indices // masks.shape[1])
