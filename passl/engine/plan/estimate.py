"""From what trials measured to the length of the run and the memory it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

from passl.engine.plan.budget import GB, PlanError
from passl.engine.plan.machine import Machine

# Of the budget, for what a short trial does not see: other work on the machine, slow disks, throttling.
_RESERVE = 0.1
_MOST_EVALUATIONS, _MOST_SAVES = 20, 50
_EVALUATING_SHARE, _SAVING_SHARE = 0.1, 0.03
_SECONDS_BETWEEN_SAVES = 120.0
# On GPUs elsewhere: what CUDA and its libraries take for themselves; what half precision leaves of the bytes counted
# in float32 (norms, softmax and the loss stay in float32); what is alive beside what is kept, at the peak.
_CONTEXT = 0.8 * GB
_HALF_SHARE = 0.6
_TRANSIENT = 1.15


@dataclass(frozen=True)
class Costs:
    """Seconds: to start (with the first step), of a step, of saving, and of an evaluation."""

    start: float
    step: float
    saving: float
    evaluating: float


@dataclass(frozen=True)
class Length:
    """The run: epochs, evaluations and saves every so many epochs (None: none), and how long all of it takes."""

    epochs: int
    eval_every: Optional[int]
    save_every: int
    seconds: float
    is_capped: bool


def costs(found: dict[str, Any], batch_size: int, scored: int) -> Costs:
    """Costs of a run by what a trial of it found; ``scored``: images of one evaluation."""
    later = found["steps"][1:] or found["steps"]
    per_image, start = found["evaluating"]
    # Batches made ahead hide a slow loader from a short trial: its own rate tells.
    step = max(step_seconds(found), batch_size / found["loading_rate"])
    return Costs(
        start=max(found["wall"] - sum(later), 0.0),
        step=step,
        saving=found["saving"],
        evaluating=start + per_image * scored if scored else 0.0,
    )


def step_seconds(found: dict[str, Any]) -> float:
    """Mean of the steps without the first, which waits for the workers to start."""
    later = found["steps"][1:] or found["steps"]
    return sum(later) / len(later)


def length(costs: Costs, steps_per_epoch: int, budget: float, most_epochs: int) -> Length:
    """The longest run that fits ``budget`` seconds.

    Raises:
        PlanError: not even one epoch fits; its text is how long one takes, in seconds.
    """
    epoch = steps_per_epoch * costs.step
    fixed = costs.start + costs.saving  # saved at the end in any case
    usable = budget * (1.0 - _RESERVE)
    if usable < fixed + epoch:
        raise TooShortError(least(costs, epoch))
    spare = usable - fixed
    evaluations = min(int(_EVALUATING_SHARE * spare / costs.evaluating), _MOST_EVALUATIONS) if costs.evaluating else 0
    if costs.evaluating and not evaluations and spare - epoch >= costs.evaluating:
        evaluations = 1
    saves = int(min(_SAVING_SHARE * spare / max(costs.saving, 1e-3), spare / _SECONDS_BETWEEN_SAVES, _MOST_SAVES))
    saves = max(saves, 1)
    epochs = int((spare - evaluations * costs.evaluating - (saves - 1) * costs.saving) / epoch)
    epochs = max(min(epochs, most_epochs), 1)
    eval_every = math.ceil(epochs / evaluations) if evaluations else None
    save_every = math.ceil(epochs / saves)
    num_evaluations = math.ceil(epochs / eval_every) if eval_every else 0
    num_saves = math.ceil(epochs / save_every)
    seconds = costs.start + epochs * epoch + num_evaluations * costs.evaluating + num_saves * costs.saving
    return Length(epochs, eval_every, save_every, seconds, epochs == most_epochs)


def least(costs: Costs, epoch: float) -> float:
    """The budget for one epoch of so many seconds."""
    return (costs.start + costs.saving + epoch) / (1.0 - _RESERVE)


class TooShortError(PlanError):
    """The budget is too short; ``seconds`` would do for one epoch."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def most_epochs(num_images: int) -> int:
    """Beyond these, more epochs over so many images bring next to nothing: 300 of ImageNet, 1000 of small sets."""
    return round(min(max(4e8 / num_images, 100), 1000))


# --- memory ---


def gpu_memory(found: dict[str, Any], micro_batch: int, machine: Machine) -> float:
    """Bytes that a process needs on a GPU that is not here, by what was counted on the CPU."""
    half = machine.dtype is not None
    trained, weights = found["trained"], found["weights"]
    fixed = weights + 3 * trained  # gradients and the two moments of Adam
    fixed += 0.5 * trained if half else 0.0  # half-precision copies of the weights
    fixed += trained if machine.processes > 1 else 0.0  # gradients on their way to the other processes
    kept = found["kept"] * (_HALF_SHARE if half else 1.0)
    return _CONTEXT + (fixed + kept * micro_batch) * _TRANSIENT


def predicted_peak(found: dict[str, Any], batch_size: int, other: int) -> float:
    """Peak of a run with ``other`` images at a time, by a trial with ``batch_size``; rather too much."""
    # What is left of the trial's peak without weights, gradients and moments grows with the images.
    still = found["idle"] + found["weights"] + 3 * found["trained"]
    varying = max(found["peak"] - still, 0.1 * found["peak"])
    return found["peak"] + max(other / batch_size - 1.0, 0.0) * varying
