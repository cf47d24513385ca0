"""DINO as a method: a student that learns to agree with its own moving average."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Callable, Optional

import paddle
from paddle import Tensor, nn

from passl.models.dino.loss import DINOLoss
from passl.models.dino.observation import Observation
from passl.models.layers import in_full_precision, learned_parameters
from passl.models.method import Method
from passl.registry import METHODS


class MultiCropNetwork(nn.Layer):
    """Backbone and head over crops of several sizes. Crops: list of [B_i, C, H_i, W_i] -> [sum of B_i, K]."""

    def __init__(self, backbone: nn.Layer, head: nn.Layer) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        features = [self.backbone(batch) for batch in merge_equal_sizes(crops)]
        # One call for all crops, so that batch norms in the head see them together. In full precision: at half of it
        # the logits of many prototypes overflow, or differ by less than what is left of them.
        return in_full_precision(self.head, _concat(features))


def merge_equal_sizes(crops: Sequence[Tensor]) -> list[Tensor]:
    """Concatenates each run of consecutive crops of one size, so that the backbone runs once for each run."""
    runs: list[list[Tensor]] = []
    for crop in crops:
        if runs and runs[-1][0].shape[1:] == crop.shape[1:]:
            runs[-1].append(crop)
        else:
            runs.append([crop])
    return [_concat(run) for run in runs]


def _concat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else paddle.concat(tensors)


@METHODS.register()
class DINO(Method):
    """Self-distillation with no labels (Caron et al. 2021).

    backbone, head: builders; the backbone has `embed_dim`, the head takes `in_dim` and has `out_dim` and `last_layer`.
    freeze_last_layer: for so many epochs the head's last layer is not trained.
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Layer],
        head: Callable[..., nn.Layer],
        freeze_last_layer: int = 1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        student_backbone = backbone()
        # The teacher has no stochastic depth, and no dropout.
        known = inspect.signature(backbone).parameters
        teacher_backbone = backbone(**{name: 0.0 for name in ("drop_path_rate", "drop_rate") if name in known})
        in_dim = student_backbone.embed_dim
        self.student = MultiCropNetwork(student_backbone, head(in_dim=in_dim))
        self.teacher = MultiCropNetwork(teacher_backbone, head(in_dim=in_dim))
        self.teacher.set_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.stop_gradient = True
        self.dino_loss = DINOLoss(self.student.head.out_dim, student_temp, center_momentum)
        self.freeze_last_layer = freeze_last_layer
        self._observation: Optional[Observation] = None

    @property
    def backbone(self) -> nn.Layer:
        """The teacher's backbone, which is the better one throughout training."""
        return self.teacher.backbone

    def pretrained_layers(self) -> list[nn.Layer]:
        """Student and teacher start equal."""
        return [self.student.backbone, self.teacher.backbone]

    def backbones(self) -> dict[str, nn.Layer]:
        return {"teacher": self.teacher.backbone, "student": self.student.backbone}

    def half_precision_layers(self) -> list[nn.Layer]:
        """Not the teacher, whose small moves would be rounded away, and no head."""
        return [self.student.backbone]

    def forward(self, batch: dict[str, Tensor], teacher_temp: float) -> dict[str, Tensor]:
        """batch: "global_crops" [2*B, C, H, W] and, if there are any, "local_crops" [n*B, C, h, w], view by view."""
        if "global_crops" not in batch:
            raise ValueError(
                f"DINO needs 'global_crops', and the batch has only {', '.join(batch) or 'nothing'}: "
                "give the data set of DataLoader.Train the transform MultiCrop"
            )
        global_crops = batch["global_crops"]
        crops = [global_crops] + ([batch["local_crops"]] if "local_crops" in batch else [])
        with paddle.no_grad():
            teacher_logits = self.teacher([global_crops])
        return {"loss": self.dino_loss(self.student(crops), teacher_logits, teacher_temp)}

    def observe(self) -> None:
        if self._observation is not None:  # of a step that was left out
            self._observation.end()
        self._observation = Observation(self.student, self.teacher, self.dino_loss)

    def diagnostics(self) -> dict[str, float]:
        """See docs/doctor.md for what each number means."""
        if self._observation is None:
            return {}
        numbers = self._observation.numbers()
        self._observation.end()
        self._observation = None
        return numbers

    def after_backward(self, epoch: int) -> None:
        """Drops the gradients of the student's last layer in the first epochs."""
        if epoch < self.freeze_last_layer:
            for parameter in self.student.head.last_layer.parameters():
                # No gradient, not a zero one: the optimizer must not decay, nor count the step. The argument is
                # set_to_zero, but Paddle ignores it as a keyword.
                parameter.clear_gradient(False)

    def after_skipped_step(self) -> None:
        self.dino_loss.forget()

    @paddle.no_grad()
    def after_step(self, teacher_momentum: float) -> None:
        """Updates the centre, and moves the teacher's parameters (not its buffers) towards the student's."""
        self.dino_loss.update_center()
        for teacher, student in zip(learned_parameters(self.teacher), learned_parameters(self.student)):
            # Half-precision students exist; their teacher stays in full precision, or small steps would round to none.
            target = student if student.dtype == teacher.dtype else student.astype(teacher.dtype)
            teacher.lerp_(target, 1.0 - teacher_momentum)
