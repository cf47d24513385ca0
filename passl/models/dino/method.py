"""DINO as a method: a student that learns to agree with its own moving average."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Sequence
from typing import Callable, Optional

import paddle
from paddle import Tensor, nn

from passl import distributed
from passl.models.dino.loss import DINOLoss
from passl.models.dino.observation import Observation
from passl.models.layer_rates import layer_rates
from passl.models.layers import in_full_precision, learned_parameters
from passl.models.method import Method
from passl.registry import METHODS
from passl.schedules import Duration, Schedule, Timeline

logger = logging.getLogger("passl")


class MultiCropNetwork(nn.Layer):
    """Backbone and head over crops of several sizes. Crops: list of [B_i, C, H_i, W_i] -> [sum of B_i, K].

    Attributes:
        frozen: the backbone is as in evaluation, and gets no gradient; see `freeze`.
    """

    def __init__(self, backbone: nn.Layer, head: nn.Layer) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen = False

    def freeze(self, frozen: bool) -> None:
        """For the coming forward passes. A frozen backbone drops no paths, and its batch norms use their running
        statistics and leave them as they are.
        """
        if frozen and self.backbone.training:  # each time, because train() of any layer above switches the flag
            self.backbone.eval()
        elif self.frozen and not frozen and self.training:
            self.backbone.train()
        self.frozen = frozen

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        with paddle.no_grad() if self.frozen else contextlib.nullcontext():
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
        student_backbone = backbone()
        layer_rates(student_backbone, layer_decay)  # refuses what does not fit
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
        self.freeze_backbone = freeze_backbone
        self.backbone_lr = backbone_lr
        self.layer_decay = layer_decay
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
        if "global_crops" not in batch:
            raise ValueError(
                f"DINO needs 'global_crops', and the batch has only {', '.join(batch) or 'nothing'}: "
                "give the data set of DataLoader.Train the transform MultiCrop"
            )
        global_crops = batch["global_crops"]
        crops = [global_crops] + ([batch["local_crops"]] if "local_crops" in batch else [])
        for network in (self.student, self.teacher):
            network.freeze(backbone_frozen > 0)
        with paddle.no_grad():
            teacher_logits = self.teacher([global_crops])
        loss = self.dino_loss(self.student(crops), teacher_logits, teacher_temp)
        if self.student.frozen and distributed.world_size() > 1:
            # Data parallel training waits for the gradients of all parameters: these are zero, and cost next to none.
            loss = loss + _zero_of(self.student.backbone, loss.dtype)
        return {"loss": loss}

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
        """Drops the gradients of the student's last layer in the first epochs, and those of a frozen backbone."""
        # No gradient, not a zero one: the optimizer must not decay, nor count the step.
        if epoch < self.freeze_last_layer:
            _drop_gradients(self.student.head.last_layer)
        if self.student.frozen:
            _drop_gradients(self.student.backbone)

    def after_skipped_step(self) -> None:
        self.dino_loss.forget()

    @paddle.no_grad()
    def after_step(self, teacher_momentum: float) -> None:
        """Updates the centre, and moves the teacher's parameters (not its buffers) towards the student's."""
        self.dino_loss.update_center()
        # Of a run that goes on with a frozen backbone, the teacher's may be another than the student's.
        networks = [n.head if self.student.frozen else n for n in (self.teacher, self.student)]
        teachers, students = map(learned_parameters, networks)
        # A tensor: of each number that Paddle 3.3 makes one of, it leaves 100 bytes behind.
        weight = paddle.full([], 1.0 - teacher_momentum, teachers[0].dtype)
        for teacher, student in zip(teachers, students):
            # Half-precision students exist; their teacher stays in full precision, or small steps would round to none.
            target = student if student.dtype == teacher.dtype else student.astype(teacher.dtype)
            teacher.lerp_(target, weight)


def _drop_gradients(layer: nn.Layer) -> None:
    for parameter in layer.parameters():
        parameter.clear_gradient(False)  # set_to_zero, which Paddle ignores as a keyword


def _zero_of(layer: nn.Layer, dtype: paddle.dtype) -> Tensor:
    """A scalar 0 that depends on every trainable parameter of ``layer``, whatever its type."""
    trainable = [parameter for parameter in layer.parameters() if not parameter.stop_gradient]
    return paddle.add_n([(parameter * 0.0).sum().astype(dtype) for parameter in trainable])
