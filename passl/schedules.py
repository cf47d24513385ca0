"""Values that change over training: pure functions from an optimizer step to a float.

A schedule is built once the length of the run is known (a :class:`Timeline`) and is then called with the step,
counted from 0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Callable, Literal, Optional, Union

from passl.registry import SCHEDULES

Schedule = Callable[[int], float]
Duration = Union[int, float, str]

BatchRule = Literal["linear", "sqrt"]
BATCH_RULES = ("linear", "sqrt")

_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(ep|it|%)\s*")


@dataclass(frozen=True)
class Timeline:
    """The length of a run: optimizer steps in all and per epoch, and images per optimizer step over all processes."""

    total_steps: int
    steps_per_epoch: int
    global_batch_size: int = 256

    def steps(self, duration: Duration) -> int:
        """Optimizer steps in ``duration``: ``"10ep"``, ``"500it"``, ``"5%"`` of the run, or a bare number of epochs.

        Raises:
            ValueError: a duration that is negative or not of these forms.
        """
        if isinstance(duration, str):
            match = _DURATION.fullmatch(duration)
            if match is None:
                raise ValueError(
                    f"duration {duration!r} must look like '10ep', '500it' or '5%', or be a number of epochs"
                )
            amount, unit = float(match[1]), match[2]
        else:
            amount, unit = float(duration), "ep"
        if not 0 <= amount < math.inf:
            raise ValueError(f"duration {duration!r} must be finite and not negative")
        scale = {"ep": self.steps_per_epoch, "it": 1, "%": self.total_steps / 100}[unit]
        return round(amount * scale)

    @property
    def by_epoch(self) -> Timeline:
        """The same run counted in epochs, for schedules that change once per epoch."""
        return Timeline(math.ceil(self.total_steps / self.steps_per_epoch), 1, self.global_batch_size)


@SCHEDULES.register("Constant")
def constant(timeline: Timeline, value: float) -> Schedule:
    """The same ``value`` at every step."""
    return lambda step: value


def _check_warmup(key: str, warmup: Duration, warmup_length: int, length: int, unit: str) -> None:
    if warmup_length > length:
        raise ValueError(
            f"{key} ({warmup}) is {warmup_length} {unit}s, longer than the run of {length} {unit}(s): the schedule "
            f"would never reach its peak. Lower {key} or raise Global.epochs"
        )


@SCHEDULES.register("Cosine")
def cosine(
    timeline: Timeline,
    base: float,
    final: float = 0.0,
    warmup: Duration = 0,
    warmup_start: float = 0.0,
    per_epoch: bool = False,
    reference_batch_size: Optional[int] = None,
    batch_rule: BatchRule = "linear",
) -> Schedule:
    """Linear warm-up to ``base``, then half a cosine towards ``final`` (Caron et al. 2021, section 3.2).

    As in the official code the warm-up holds both its ends (so the peak comes twice) and the cosine stops one step
    before ``final``. With ``base == final`` it is a warm-up to a constant: the teacher temperature.

    Args:
        warmup: a duration up to the whole run, see :meth:`Timeline.steps`.
        per_epoch: the value changes at the start of each epoch instead of at each step.
        reference_batch_size: the batch that ``base`` is meant for; another global batch size multiplies it, by ...
        batch_rule: ... "linear": global batch size / this (DINO); "sqrt": the square root of that (DINOv2).

    Raises:
        ValueError: a warm-up longer than the run, or a wrong duration, batch size or rule.
    """
    if batch_rule not in BATCH_RULES:
        raise ValueError(f"batch_rule ({batch_rule!r}) must be one of {', '.join(BATCH_RULES)}")
    if reference_batch_size is not None:
        if reference_batch_size <= 0:
            raise ValueError(f"reference_batch_size ({reference_batch_size}) must be positive")
        if batch_rule == "linear":
            base = base * timeline.global_batch_size / reference_batch_size
        else:
            base = base * math.sqrt(timeline.global_batch_size / reference_batch_size)
    elif batch_rule != "linear":
        raise ValueError(f"batch_rule ({batch_rule}) needs a reference_batch_size, the batch that base is meant for")
    clock = timeline.by_epoch if per_epoch else timeline
    # Through steps, because "500it" and "5%" are not whole epochs.
    warmup_length = timeline.steps(warmup)
    _check_warmup("warmup", warmup, warmup_length, timeline.total_steps, "step")
    if per_epoch:
        warmup_length = math.ceil(warmup_length / timeline.steps_per_epoch)
    cosine_length = clock.total_steps - warmup_length

    def value(step: int) -> float:
        position = step // timeline.steps_per_epoch if per_epoch else step
        if position < warmup_length:
            if position == warmup_length - 1 and warmup_length > 1:
                return base
            return warmup_start + position * ((base - warmup_start) / max(warmup_length - 1, 1))
        angle = math.pi * (position - warmup_length) / max(cosine_length, 1)
        return final + 0.5 * (base - final) * (1 + math.cos(angle))

    return value


@SCHEDULES.register("TimmCosine")
def timm_cosine(
    timeline: Timeline,
    learning_rate: float,
    decay_unit: str = "epoch",
    warmup_epoch: int = 0,
    warmup_start_lr: float = 0.0,
    eta_min: float = 0.0,
    last_epoch: int = -1,
) -> Schedule:
    """PASSL's cosine: half a cosine over the *whole* run whose first ``warmup_epoch`` epochs are replaced by a line.

    ``learning_rate`` is final: it is not scaled by the batch. ``last_epoch`` is accepted because published configs
    carry it; where a run goes on is decided by its checkpoint alone.

    Raises:
        ValueError: a warm-up longer than the run, or an unknown ``decay_unit``.
    """
    if decay_unit not in ("epoch", "step"):
        raise ValueError(f"decay_unit ({decay_unit!r}) must be 'epoch' or 'step'")
    per_epoch = decay_unit == "epoch"
    length = timeline.by_epoch.total_steps if per_epoch else timeline.total_steps
    warmup_length = warmup_epoch if per_epoch else warmup_epoch * timeline.steps_per_epoch
    _check_warmup("warmup_epoch", warmup_epoch, warmup_length, length, decay_unit)

    def value(step: int) -> float:
        position = step // timeline.steps_per_epoch if per_epoch else step
        if position < warmup_length:
            return warmup_start_lr + (learning_rate - warmup_start_lr) * position / warmup_length
        return eta_min + 0.5 * (learning_rate - eta_min) * (1 + math.cos(math.pi * position / length))

    return value
