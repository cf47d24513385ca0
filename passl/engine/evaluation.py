"""Evaluation in the course of a run: which checkpoint is best, and whether to go on."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from passl import distributed
from passl.engine.early_stopping import STUDENT_METRIC, TEACHER_METRIC, EarlyStopping
from passl.engine.hooks import CheckpointHook, LogHook
from passl.engine.trainer import Trainer
from passl.evaluators.evaluator import Evaluator, evaluate

logger = logging.getLogger("passl")


class Measuring:
    """Runs evaluators on a trainer's method, and writes what they found.

    Args:
        folder: of the run; evaluators may write files to it.
    """

    def __init__(
        self, evaluators: Sequence[Evaluator], log: LogHook, checkpoints: CheckpointHook, folder: Path
    ) -> None:
        self.evaluators = list(evaluators)
        self.log = log
        self.checkpoints = checkpoints
        self.folder = folder
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def run(self, trainer: Trainer) -> dict[str, float]:
        """The numbers of all evaluators; those of one step are measured once."""
        if self._last[0] == trainer.step:
            return self._last[1]
        started = time.perf_counter()
        try:
            results = self._evaluate(trainer)
        except Exception:
            # What was trained up to here is not lost with the run, unless that takes the others, who may not be here.
            if not trainer.optimizer.is_shared:
                self.checkpoints.save(trainer, is_best=False)
            raise
        shown = ", ".join(f"{name}: {value:.5f}" for name, value in results.items())
        seconds = time.perf_counter() - started
        self.log.evaluation_seconds += seconds
        logger.info("[Eval][Epoch %d][Avg] %s, time: %.1f s", trainer.epoch + 1, shown, seconds)
        self._last = trainer.step, results
        return results

    def record(self, trainer: Trainer, values: dict[str, Any]) -> None:
        self.log.record(trainer.step, {"epoch": trainer.epoch + 1, **values}, "eval")

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        results: dict[str, float] = {}
        for evaluator in self.evaluators:
            # Weights that were cast to half precision need inputs that are cast too.
            with trainer.precision.autocast() if trainer.precision.level == "O2" else contextlib.nullcontext():
                results.update(evaluate(evaluator, trainer.method, self.folder))
        trainer.method.train()
        return results


class EvaluationHook:
    """Runs evaluators every ``interval`` steps and at the end.

    Args:
        decides_best: the first one's key metric decides which checkpoint is best.
    """

    def __init__(self, measuring: Measuring, interval: int, decides_best: bool = True) -> None:
        self.measuring = measuring
        self.interval = interval
        self.decides_best = decides_best

    def before_train(self, trainer: Trainer) -> None:
        trainer.progress.setdefault("best_metric", None)
        # A run that was told to stop saved first, and left the measurement to this one.
        if trainer.progress.pop("evaluation_is_due", False):
            self._measure(trainer)
            self.measuring.checkpoints.made_up_for(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if self.decides_best:
            trainer.progress["is_best"] = False
        if trainer.step % self.interval and trainer.step != trainer.stop_step:
            return
        if trainer.is_interrupted:
            trainer.progress["evaluation_is_due"] = True
        else:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        results = self.measuring.run(trainer)
        if self.decides_best:
            self._keep_best(trainer, results)
        self.measuring.record(trainer, results)

    def _keep_best(self, trainer: Trainer, results: dict[str, float]) -> None:
        key = self.measuring.evaluators[0].key_metric
        epoch, best = trainer.epoch + 1, trainer.progress["best_metric"]
        if best is None or best != best or results[key] > best:  # NaN is not equal to itself
            trainer.progress.update(best_metric=results[key], best_epoch=epoch, is_best=True)
        _log_best(trainer, key)

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the last step was evaluated."""


class EarlyStoppingHook:
    """Measures teacher and student by k-NN where the rule asks for it, decides on the first process which checkpoint is
    best and whether the run ends, and has all processes obey. A measurement at the end that the rule does not ask for
    decides nothing.

    Args:
        measuring: with the deciding KNN alone.
    """

    def __init__(self, rule: EarlyStopping, measuring: Measuring) -> None:
        self.rule = rule
        self.measuring = measuring

    def before_train(self, trainer: Trainer) -> None:
        trainer.progress.setdefault("best_metric", None)
        trainer.progress.setdefault("early_stopping", None)
        state = trainer.progress["early_stopping"]
        if state and state["stopped"] and state["epoch"] == trainer.epoch:  # else it has been trained on without a rule
            if self.rule.is_over(state["counter"], trainer.epoch):
                logger.warning(
                    "this run was stopped early after epoch %d (%d measurements without a new best, patience %d): it "
                    "is not trained on. To go on all the same, raise Global.early_stopping.patience or min_epoch, or "
                    "give -o Global.early_stopping=null",
                    trainer.epoch + 1,
                    state["counter"],
                    self.rule.patience,
                )
                trainer.stop()
                return
            logger.info(
                "this run was stopped early after epoch %d; by the present Global.early_stopping it goes on",
                trainer.epoch + 1,
            )
            trainer.progress["early_stopping"] = {**state, "stopped": False}
        self._check_reach(trainer)
        self._catch_up(trainer)

    def _check_reach(self, trainer: Trainer) -> None:
        if self.rule.earliest_end() >= trainer.epochs - 1:
            logger.warning(
                "Global.early_stopping can end a run after epoch %d at the earliest, and this one has %d epochs: lower "
                "tune_every, patience or min_epoch",
                self.rule.earliest_end() + 1,
                trainer.epochs,
            )

    def _catch_up(self, trainer: Trainer) -> None:
        """Measures the epoch after which the run is resumed, if that is missing: its measurement may have failed."""
        state = trainer.progress["early_stopping"]
        if self._is_due(trainer) and (state is None or state["epoch"] < trainer.epoch):
            self.after_step(trainer)
            self.measuring.checkpoints.made_up_for(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.at_epoch_end and self.rule.is_due(trainer.epoch)

    def after_step(self, trainer: Trainer) -> None:
        trainer.progress["is_best"] = False
        due = self._is_due(trainer)
        if trainer.is_interrupted or (not due and trainer.step != trainer.stop_step):
            return  # a run that was told to stop measures when it is resumed
        results = self.measuring.run(trainer)
        values: dict[str, Any] = dict(results)
        if due:
            # Processes that decided for themselves could part for ever over the last bit of a sum.
            values.update(self._decide(trainer, results[TEACHER_METRIC], results[STUDENT_METRIC]))
        self.measuring.record(trainer, values)

    def _decide(self, trainer: Trainer, teacher: float, student: float) -> dict[str, Any]:
        """Takes the first process's decision over, and returns it for the record."""
        own = None
        if distributed.is_main():
            own = self.rule.judged(trainer.progress["early_stopping"], trainer.epoch, teacher, student)
        state = distributed.broadcast_object(own)
        trainer.progress["early_stopping"] = state
        if state["counter"] == 0:
            trainer.progress.update(best_metric=state["best"], best_epoch=trainer.epoch + 1, is_best=True)
        _log_best(trainer, TEACHER_METRIC)
        if state["counter"]:
            reason = "below the best" if teacher < state["best"] else "not above its student"
            logger.info(
                "[Eval][Epoch %d] early stopping: the teacher (%.5f) is %s (%.5f): %d without a new best (patience %d)",
                trainer.epoch + 1,
                teacher,
                reason,
                state["best"] if teacher < state["best"] else student,
                state["counter"],
                self.rule.patience,
            )
        if state["stopped"]:
            logger.info(
                "stopping early after epoch %d of %d: %d measurements without a new best (patience %d, min_epoch %d); "
                "the best is that of epoch %s",
                trainer.epoch + 1,
                trainer.epochs,
                state["counter"],
                self.rule.patience,
                self.rule.min_epoch,
                trainer.progress["best_epoch"] or 0,
            )
            trainer.stop()
        return {"early_stopping_counter": state["counter"], "early_stopping_stopped": int(state["stopped"])}

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the last step was evaluated."""


def _log_best(trainer: Trainer, key: str) -> None:
    if trainer.progress["best_metric"] is None:  # the guard took back what was found, and nothing was before
        return
    logger.info(
        "[Eval][Epoch %d][best metric: %.5f] (%s, epoch %d)",
        trainer.epoch + 1,
        trainer.progress["best_metric"],
        key,
        trainer.progress["best_epoch"],
    )
