"""What the methods have in common whose student learns from its own moving average."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Optional

import paddle
from paddle import Tensor, nn

from passl.config import ConfigError
from passl.models.layers import learned_parameters
from passl.models.method import Method
from passl.models.multi_crop import MultiCropNetwork
from passl.models.observation import Observation


class SelfDistillation(Method):
    """A student, and a teacher that starts equal to it and follows it without gradient.

    A subclass calls `_build` in its constructor and defines `dino_loss`, which takes (student_logits, teacher_logits,
    teacher_temp).
    """

    student: MultiCropNetwork
    teacher: MultiCropNetwork
    dino_loss: nn.Layer
    _observation: Optional[Observation] = None

    def _build(self, backbone: Callable[..., nn.Layer], head: Callable[..., nn.Layer]) -> None:
        """backbone, head: builders; the backbone has `embed_dim`, the head takes `in_dim` and has `out_dim` and
        `last_layer`.
        """
        student_backbone = backbone()
        # The teacher has no stochastic depth, and no dropout.
        known = inspect.signature(backbone).parameters
        teacher_backbone = backbone(**{name: 0.0 for name in ("drop_path_rate", "drop_rate") if name in known})
        in_dim = student_backbone.embed_dim
        self.student = MultiCropNetwork(student_backbone, head(in_dim=in_dim))
        self.teacher = MultiCropNetwork(teacher_backbone, head(in_dim=in_dim))
        start_equal(self.teacher, self.student)

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


def start_equal(teacher: nn.Layer, student: nn.Layer) -> None:
    """Gives ``teacher`` the student's values, and no gradient."""
    teacher.set_state_dict(student.state_dict())
    for parameter in teacher.parameters():
        parameter.stop_gradient = True


@paddle.no_grad()
def follow(teacher: nn.Layer, student: nn.Layer, momentum: float) -> None:
    """Moves the teacher's parameters, not its buffers, towards the student's by ``1 - momentum`` of the way."""
    teachers, students = learned_parameters(teacher), learned_parameters(student)
    # A tensor: of each number that Paddle 3.3 makes one of, it leaves 100 bytes behind.
    weight = paddle.full([], 1.0 - momentum, teachers[0].dtype)
    for target, source in zip(teachers, students):
        # Half-precision students exist; their teacher stays in full precision, or small steps would round to none.
        target.lerp_(source if source.dtype == target.dtype else source.astype(target.dtype), weight)


def drop_gradients(layer: nn.Layer) -> None:
    """No gradient, not a zero one: the optimizer must not decay, nor count the step."""
    for parameter in layer.parameters():
        parameter.clear_gradient(False)  # set_to_zero, which Paddle ignores as a keyword


def zero_of(layer: nn.Layer, dtype: paddle.dtype) -> Tensor:
    """A scalar 0 that depends on every trainable parameter of ``layer``, whatever its type: data parallel training
    waits for the gradients of all parameters; these are zero, and cost next to none.
    """
    trainable = [parameter for parameter in layer.parameters() if not parameter.stop_gradient]
    return paddle.add_n([(parameter * 0.0).sum().astype(dtype) for parameter in trainable])


def crops_of(batch: dict[str, Tensor], method: str) -> list[Tensor]:
    """The global crops [2*B, C, H, W] and, if there are any, the local ones [n*B, C, h, w], view by view.

    Raises:
        ConfigError: there are no global crops.
    """
    if "global_crops" not in batch:
        raise ConfigError(
            [
                f"{method} needs 'global_crops', and the batch has only {', '.join(batch) or 'nothing'}: "
                "give the data set of DataLoader.Train the transform MultiCrop"
            ]
        )
    return [batch["global_crops"]] + ([batch["local_crops"]] if "local_crops" in batch else [])
