"""What an algorithm is to the engine."""

from __future__ import annotations

from typing import Any

from paddle import Tensor, nn

from passl.schedules import Schedule, Timeline


class Method(nn.Layer):
    """Base of every algorithm with a gradient; the engine calls nothing else than what is named here.

    A step is: forward -> backward -> after_backward -> clipping's and the optimizer's step -> after_step. With
    gradient accumulation there are several forward and backward calls before one after_backward and after_step.
    Scheduled values (teacher_temp, teacher_momentum ...) arrive as keywords of forward or after_step.
    """

    backbone: nn.Layer  # what is evaluated, exported and converted
    needs_pretrained = False  # True: starting from random weights is worth a warning

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": scalar, ...more scalars to log}"""
        raise NotImplementedError(f"{type(self).__name__} must define forward(batch, ...)")

    def param_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters: [{"params": regularised, "weight_decay": 1.0}, {"params": rest, "weight_decay": 0.0}].

        Not regularised are biases and 1-D parameters, as in the official code. weight_decay is a factor on the
        scheduled value. Parameters with a share of their own (see `learning_rate_shares`) come in two such groups for
        each share, with "learning_rate": the share.
        """
        shares = self.learning_rate_shares()
        groups: dict[tuple[float, float], list[Tensor]] = {(1.0, 1.0): [], (1.0, 0.0): []}
        for name, parameter in self.named_parameters():
            if not parameter.stop_gradient:
                decay = 1.0 if is_regularized(name, parameter.ndim) else 0.0
                groups.setdefault((shares.get(name, 1.0), decay), []).append(parameter)
        return [
            {"params": params, "weight_decay": decay, **({} if share == 1.0 else {"learning_rate": share})}
            for (share, decay), params in groups.items()
        ]

    def learning_rate_shares(self) -> dict[str, float]:
        """Factors on the scheduled learning rate, by parameter name, of parameters that do not take it as it is."""
        return {}

    def schedules(self, timeline: Timeline) -> dict[str, Schedule]:
        """Schedules that follow from the method's own arguments, by the keyword of forward or after_step."""
        return {}

    def after_backward(self, epoch: int) -> None:
        """Called once per optimizer step, when all gradients are there. epoch counts from 0."""

    def after_step(self) -> None:
        """Called after the optimizer's step."""

    def after_skipped_step(self) -> None:
        """Called instead of after_backward and after_step when the step is left out: forget what forward kept."""

    def observe(self) -> None:
        """Asks to keep, detached, what the coming forward call computes, for :meth:`diagnostics`."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers about what was kept since :meth:`observe`, over all processes, all of which must call it; then it is
        forgotten. {}: there is nothing to tell.
        """
        return {}

    def pretrained_layers(self) -> list[nn.Layer]:
        """The backbones that start from `Global.pretrained_model`."""
        return [self.backbone]

    def backbones(self) -> dict[str, nn.Layer]:
        """What can be evaluated side by side: `backbone` as "teacher" and, where there is one, the "student"'s."""
        return {"teacher": self.backbone}

    def half_precision_layers(self) -> list[nn.Layer]:
        """What is cast to half precision at level O2; the rest keeps float32 weights."""
        return [self]


def is_regularized(name: str, ndim: int) -> bool:
    """Whether weight decay applies to a parameter: not to biases and 1-D parameters.

    The gain of a weight-normed layer is 1-D here, but (K, 1) in PyTorch, where it therefore is regularised.
    """
    return name.endswith(".weight_g") or (ndim > 1 and not name.endswith(".bias"))
