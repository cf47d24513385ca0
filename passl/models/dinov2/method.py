"""DINOv2 as a method: DINO, its likeness between patches (iBOT), and features that keep apart (KoLeo)."""

from __future__ import annotations

import math
from typing import Callable, Optional, Union

import paddle
from paddle import Tensor, nn

from passl.config import ConfigError
from passl.models.centering import Centering
from passl.models.dino_loss import DINOLoss
from passl.models.dinov2.ibot_loss import IBOTLoss
from passl.models.dinov2.koleo_loss import koleo_loss
from passl.models.distillation import SelfDistillation, crops_of, drop_gradients, follow, start_equal
from passl.models.layer_rates import has_blocks, layer_rates
from passl.models.layers import in_full_precision
from passl.models.multi_crop import MultiCropNetwork
from passl.registry import METHODS

_LAYER_DECAY = 0.9


@METHODS.register()
class DINOv2(SelfDistillation):
    """DINOv2 (Oquab et al. 2023): DINO between views, iBOT between hidden patches, KoLeo between images.

    The loss is the sum of the three, each times its weight: DINO's over all pairs of a teacher view and another student
    view, iBOT's over the two global views, and KoLeo's of each global view by itself, added up.

    backbone, head: builders, as those of DINO. To hide patches takes a backbone with `forward_crops`, `patch_size` and
        `mask_token`.
    ibot_head: builder of a head of the patches' own; None: they share that of the views.
    freeze_last_layer: for so many epochs the heads' last layers are not trained.
    centering: how the teacher is kept from collapse, by a running "softmax" centre or by "sinkhorn" (Sinkhorn-Knopp).
    dino_loss_weight, ibot_loss_weight, koleo_loss_weight: from 0 up. Without iBOT no patch is hidden; DINO's loss is
        computed, and logged, also at 0.
    layer_decay: the deeper a layer of the backbone is, the less of the learning rate it takes (`layer_rates`): null is
        0.9, and 1 for a backbone without blocks ...
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
        layer_decay: Optional[float] = None,
        patch_embed_lr: float = 0.2,
    ) -> None:
        super().__init__()
        self.loss_weights = {"dino": dino_loss_weight, "ibot": ibot_loss_weight, "koleo": koleo_loss_weight}
        _check_weights(self.loss_weights)
        if not 0 <= patch_embed_lr < math.inf:
            raise ValueError(f"patch_embed_lr ({patch_embed_lr}) must be at least 0, a share of the learning rate")
        if ibot_head is not None and not ibot_loss_weight:
            raise ValueError(
                "ibot_head has nothing to learn from with ibot_loss_weight: 0; leave it out, or raise ibot_loss_weight"
            )
        self._build(backbone, head)
        self._hides_patches = ibot_loss_weight > 0
        self._has_ibot_head = ibot_head is not None
        if ibot_head is not None:
            in_dim = self.student.backbone.embed_dim
            self.student_ibot_head, self.teacher_ibot_head = ibot_head(in_dim=in_dim), ibot_head(in_dim=in_dim)
            start_equal(self.teacher_ibot_head, self.student_ibot_head)
        self.dino_loss = DINOLoss(self.student.head.out_dim, student_temp, center_momentum, centering)
        if self._hides_patches:
            _check_hides_patches(self.student.backbone)
            self.student.backbone.mask_token.stop_gradient = False
            self.ibot_loss = IBOTLoss(self._ibot_heads()[0].out_dim, student_temp, center_momentum, centering)
        if layer_decay is None:
            layer_decay = _LAYER_DECAY if has_blocks(self.student.backbone) else 1.0
        self.freeze_last_layer = freeze_last_layer
        self.layer_decay = layer_decay
        self.patch_embed_lr = patch_embed_lr
        layer_rates(self.student.backbone, layer_decay)  # refuses what does not fit

    def _ibot_heads(self) -> tuple[nn.Layer, nn.Layer]:
        """The student's and the teacher's head for patches."""
        if self._has_ibot_head:
            return self.student_ibot_head, self.teacher_ibot_head
        return self.student.head, self.teacher.head

    def learning_rate_shares(self) -> dict[str, float]:
        """Those of the student's backbone, by layer_decay and patch_embed_lr."""
        if self.layer_decay == self.patch_embed_lr == 1:
            return {}
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
        features, patches = _features(self.student, crops, masks)
        with paddle.no_grad():
            teacher_features, teacher_patches = _features(self.teacher, crops[:1], masks, hide=False)
            teacher_logits = in_full_precision(self.teacher.head, teacher_features)
        student_logits = in_full_precision(self.student.head, features)
        losses = {"dino": self.dino_loss(student_logits, teacher_logits, teacher_temp)}
        if self.loss_weights["koleo"]:
            losses["koleo"] = sum(koleo_loss(view) for view in features[: crops[0].shape[0]].chunk(2))
        if masks is not None:
            losses["ibot"] = self._patch_loss(patches, teacher_patches, masks, teacher_temp)
        total = sum(self.loss_weights[name] * loss for name, loss in losses.items())
        return {"loss": total, **{f"{name}_loss": loss for name, loss in losses.items()}}

    def _masks(self, batch: dict[str, Tensor]) -> Optional[Tensor]:
        """bool [2*B, N], or None where no patch is to be hidden"""
        if not self._hides_patches:
            return None
        if "masks" not in batch:
            raise ConfigError(
                [
                    "DINOv2 needs 'masks', the patches to hide from the student: give DataLoader.Train the "
                    "batch_transform BlockMasks, or the model ibot_loss_weight: 0"
                ]
            )
        masks, (num_images, _, height, width) = batch["masks"], batch["global_crops"].shape
        side = self.student.backbone.patch_size
        expected = [num_images, (height // side) * (width // side)]
        if list(masks.shape) != expected:
            raise ConfigError(
                [
                    f"masks {list(masks.shape)} must be [images, patches], here {expected}: the patch_size of "
                    f"DataLoader.Train.batch_transform must be that of the backbone, {side}"
                ]
            )
        return masks.astype("bool")

    def _patch_loss(self, student: Tensor, teacher: Tensor, masks: Tensor, teacher_temp: float) -> Tensor:
        """student, teacher: [2*B, N, D], masks: [2*B, N]"""
        indices, weights = hidden_patches(masks, self.ibot_loss.center.dtype)
        student_head, teacher_head = self._ibot_heads()
        with paddle.no_grad():
            teacher_logits = in_full_precision(teacher_head, teacher.flatten(0, 1).index_select(indices))
        student_logits = in_full_precision(student_head, student.flatten(0, 1).index_select(indices))
        return self.ibot_loss(student_logits, teacher_logits, weights, masks.shape[0], teacher_temp)

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


def _check_weights(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}_loss_weight ({weight}) must be a number from 0 up; 0 leaves that loss out")
    if not (weights["dino"] or weights["ibot"]):
        raise ValueError(
            "dino_loss_weight and ibot_loss_weight are both 0: nothing would learn from the teacher. Raise one of them"
        )


def _check_hides_patches(backbone: nn.Layer) -> None:
    name = type(backbone).__name__
    if not (hasattr(backbone, "forward_crops") and hasattr(backbone, "patch_size")):
        raise ValueError(
            f"{name} has no patches to hide (no forward_crops and patch_size): give a vision transformer with "
            "mask_token: true, or ibot_loss_weight: 0"
        )
    if getattr(backbone, "mask_token", None) is None:
        raise ValueError(
            f"{name} has no mask token to stand for hidden patches: a backbone with mask_token: true, or "
            "ibot_loss_weight: 0"
        )


def _features(
    network: MultiCropNetwork, crops: list[Tensor], masks: Optional[Tensor], hide: bool = True
) -> tuple[Tensor, Optional[Tensor]]:
    """The features of all crops [sum of B_i, D], and where there are masks the patches of the first ones [2*B, N, D].

    hide: whether the mask token stands where masks [2*B, N] are true.
    """
    if masks is None:
        return network.features(crops), None
    tokens = network.backbone.forward_crops(crops, [masks if hide else None] + [None] * (len(crops) - 1))
    return paddle.concat([part[:, 0] for part in tokens]), tokens[0][:, -masks.shape[1] :]


def hidden_patches(masks: Tensor, dtype: Union[str, paddle.dtype] = "float32") -> tuple[Tensor, Tensor]:
    """masks: bool [B, N] -> the flat indices [M] of what is hidden, and the weights [M], 1/number hidden in its image.

    Where nothing is hidden it is one patch of weight 0: every head has to take part in every step, and all processes in
    the centring.
    """
    numbers = masks.astype(dtype)  # Paddle 2.6 flattens no bools
    indices = numbers.flatten().nonzero().flatten()
    if indices.shape[0] == 0:
        return paddle.zeros([1], "int64"), paddle.zeros([1], dtype)
    return indices, 1.0 / numbers.sum(1).index_select(indices // masks.shape[1])
