"""When a pre-training run has passed its best: the rule of clemsgrs/dino, and who measures for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from passl.config import ConfigError
from passl.evaluators import KNN, Evaluator
from passl.models.method import Method

K, TEMPERATURE = 20, 0.07
TEACHER_METRIC, STUDENT_METRIC = f"knn_top1_k{K}", f"student_knn_top1_k{K}"


@dataclass(frozen=True)
class EarlyStopping:
    """``Global.early_stopping``: ends a run whose teacher has ceased to get better and to lead its student.

    Epochs count from 0, as in the original: measured are the epochs 0, ``tune_every``, 2 ``tune_every`` ..., each at
    its end. The first measurement, and one whose teacher is at least as good as the best one and better than its own
    student, is the new best; any other one is counted.

    Args:
        tune_every: epochs from one measurement to the next.
        patience: the run ends after so many measurements in a row without a new best ...
        min_epoch: ... but only after an epoch above this one.
    """

    tune_every: int = 1
    patience: int = 20
    min_epoch: int = 30

    def __post_init__(self) -> None:
        for name, lowest in (("tune_every", 1), ("patience", 1), ("min_epoch", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {lowest}")

    def is_due(self, epoch: int) -> bool:
        return epoch % self.tune_every == 0

    def is_over(self, counter: int, epoch: int) -> bool:
        """Whether ``counter`` measurements without a new best end the run after ``epoch``."""
        return counter >= self.patience and epoch > self.min_epoch

    def judged(self, state: Optional[Mapping[str, Any]], epoch: int, teacher: float, student: float) -> dict[str, Any]:
        """The state after a measurement; ``state`` is the one before (None: this is the first).

        Returns:
            epoch: of this measurement; best: the teacher's value that counts as best; counter: measurements since it,
            0 if it is this one; stopped: whether the run ends.
        """
        if state is None or (teacher >= state["best"] and teacher > student):
            return {"epoch": epoch, "best": teacher, "counter": 0, "stopped": False}
        counter = state["counter"] + 1
        return {"epoch": epoch, "best": state["best"], "counter": counter, "stopped": self.is_over(counter, epoch)}

    def earliest_end(self) -> int:
        """The first epoch after which a run can end."""
        measurement = max(self.patience, self.min_epoch // self.tune_every + 1)
        return measurement * self.tune_every


def deciding_evaluator(evaluators: Sequence[Evaluator], method: Method) -> KNN:
    """The first of ``evaluators`` that measures what the rule compares in ``method``.

    Raises:
        ConfigError: there is none; the text says what to add.
    """
    if "student" not in method.backbones():
        raise ConfigError(
            [
                f"Global.early_stopping: it compares teacher and student, and {type(method).__name__} has no student: "
                "remove it"
            ]
        )
    found = [evaluator for evaluator in evaluators if isinstance(evaluator, KNN)]
    if not found:
        raise ConfigError(
            [
                "Global.early_stopping: it compares teacher and student by k-NN, and Evaluators has no KNN. Add "
                f"{{name: KNN, k: [{K}], models: [teacher, student], train_dataset: ..., val_dataset: ...}}"
            ]
        )
    missing = [_missing(evaluator) for evaluator in found]
    for evaluator, changes in zip(found, missing):
        if not changes:
            return evaluator
    raise ConfigError([f"Global.early_stopping: the KNN in Evaluators needs {' and '.join(missing[0])}"])


def _missing(evaluator: KNN) -> list[str]:
    changes = []
    if set(evaluator.models) != {"teacher", "student"}:
        changes.append("models: [teacher, student]")
    if K not in evaluator.k:
        changes.append(f"k: {[*evaluator.k, K]}")
    if evaluator.temperature != TEMPERATURE:
        changes.append(f"temperature: {TEMPERATURE}")
    if evaluator.prefix:
        changes.append("no prefix")
    return changes
