"""A guard over the features that a run starts with: before training destroys them, it goes back and learns slower."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

from passl import checkpoint, distributed
from passl.checkpoint import CheckpointError
from passl.engine.hooks import CheckpointHook, LogHook
from passl.engine.roll_back import RollBack
from passl.engine.trainer import Trainer

logger = logging.getLogger("passl")


@dataclass(frozen=True)
class Guard:
    """``Global.guard``: goes back to the best checkpoint, or stops, when training destroys what the run started with.

    Args:
        metric: knn: the first KNN in Evaluators, of the teacher; drift: how far the teacher's features of some training
            images have turned from the first ones, 1 - mean cosine similarity, which needs no labels.
        every: from one measurement to the next: epochs, or "500it", "5%". The end is measured too.
        max_drop: points of k-NN below the best one (or the start's) that are still good.
        max_drift: a drift of the teacher that is still good. `best` has none above it of the student, either.
        on_trip: roll_back: train on from the checkpoint ``best`` with a lower learning rate; stop: end the run.
        lr_factor: each roll-back multiplies the scheduled learning rate by it.
        max_rollbacks: after so many the run ends.
        num_images: watched by drift.
    """

    metric: Literal["knn", "drift"] = "drift"
    every: Union[int, float, str] = 1
    max_drop: float = 2.0
    max_drift: float = 0.3
    on_trip: Literal["roll_back", "stop"] = "roll_back"
    lr_factor: float = 0.5
    max_rollbacks: int = 3
    num_images: int = 128

    def __post_init__(self) -> None:
        for name, lowest in (("max_drop", 0), ("max_drift", 0), ("max_rollbacks", 0), ("num_images", 1)):
            if not getattr(self, name) >= lowest:  # also NaN
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {lowest}")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"lr_factor ({self.lr_factor}) must be above 0 and below 1: else all would happen again")

    @property
    def limit(self) -> float:
        """The largest damage that is still good."""
        return self.max_drop if self.metric == "knn" else self.max_drift

    def is_good(self, damage: float) -> bool:
        return damage <= self.limit  # NaN is not

    def goes_back(self, rollbacks: int) -> bool:
        """Whether a run that has gone back so many times does so again."""
        return self.on_trip == "roll_back" and rollbacks < self.max_rollbacks


class GuardHook:
    """Measures the start, which it saves as the first ``best``, then every ``interval`` steps, and any other state that
    is about to become the best; decides on the first process, and has all processes obey.

    Args:
        watch: see ``feature_watch.Watch``.
        decides_best: whether each good state, if that is as good as the best, is saved as ``best``.
    """

    def __init__(
        self, guard: Guard, interval: int, watch: Any, log: LogHook, checkpoints: CheckpointHook, decides_best: bool
    ) -> None:
        self.guard = guard
        self.interval = interval
        self.watch = watch
        self.log = log
        self.checkpoints = checkpoints
        self.decides_best = decides_best

    def before_train(self, trainer: Trainer) -> None:
        state = trainer.progress.get("guard")
        if state is None or state["metric"] != self.watch.name:
            self._begin(trainer)
        elif state["stopped"] == trainer.step and not self.guard.is_good(state["damage"]):
            logger.warning(
                "this run was stopped by Global.guard after step %d (%s): it is not trained on. To go on all the same, "
                "give -o Global.guard=null; to try again from its best, -o Global.checkpoint=%s and other settings",
                trainer.step,
                self._said(state),
                self.checkpoints.store.folder / "best",
            )
            trainer.stop()
        else:
            trainer.progress["guard"] = {**state, "stopped": None}
            if trainer.step == 0:
                self._record(trainer)  # metrics.jsonl is begun anew
            if trainer.progress.get("is_best"):  # by a measurement that is made up for
                self._look(trainer)

    def _begin(self, trainer: Trainer) -> None:
        state = {"metric": self.watch.name, "rollbacks": 0, "stopped": None, **self.watch.begin(trainer)}
        trainer.progress["guard"] = state = distributed.broadcast_object(state)
        self._record(trainer)
        logger.info("[Guard] step %d: %s; this is what is guarded", trainer.step, self._said(state))
        if self.decides_best:
            self._count_as_best(trainer)
        # There must be something good to go back to.
        self.checkpoints.save(trainer, is_best=self.decides_best or distributed.broadcast_object(self._best() is None))

    def after_step(self, trainer: Trainer) -> None:
        if self.decides_best:
            trainer.progress["is_best"] = False
        is_due = trainer.step % self.interval == 0 or trainer.step == trainer.stop_step
        # What others find the best may be what this run goes back to.
        if not is_due and not trainer.progress.get("is_best"):
            return
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        state = distributed.broadcast_object(self.watch.measure(trainer, trainer.progress["guard"]))
        trainer.progress["guard"] = state
        self._record(trainer)
        if not self.guard.is_good(state["damage"]):
            self._trip(trainer)
            return
        logger.info("[Guard][Epoch %d] %s", trainer.epoch + 1, self._said(state))
        if not self.guard.is_good(state["coming"]):
            self._take_back_best(trainer)
        elif self.decides_best and state["value"] >= state.get("best", state["value"]):
            self._count_as_best(trainer)
            trainer.progress["is_best"] = True

    def _count_as_best(self, trainer: Trainer) -> None:
        trainer.progress["best_epoch"] = trainer.epoch + 1 if trainer.step else 0
        if "best" in trainer.progress["guard"]:
            trainer.progress["best_metric"] = trainer.progress["guard"]["best"]

    def _trip(self, trainer: Trainer) -> None:
        """Raises RollBack, or ends the run."""
        state = trainer.progress["guard"]
        best = distributed.broadcast_object(self._best())
        what = f"[Guard] step {trainer.step} (epoch {trainer.epoch + 1}): {self._said(state)}: features are being lost"
        if self.guard.goes_back(state["rollbacks"]):
            rollbacks = state["rollbacks"] + 1
            factor = trainer.progress.get("lr_factor", 1.0) * self.guard.lr_factor
            where = "the newest checkpoint" if best is None else f"the best checkpoint (step {best['step']})"
            kept = (best["progress"].get("guard") if best else None) or state
            raise RollBack(
                f"{what}; roll-back {rollbacks} of {self.guard.max_rollbacks} to {where}, and the learning rate from "
                f"there is {factor:g} of its schedule",
                self.checkpoints.store.folder / "best" if best else None,
                {"guard": {**kept, "rollbacks": rollbacks}, "lr_factor": factor},
            )
        logger.warning(
            "%s; stopping after %d roll-backs%s",
            what,
            state["rollbacks"],
            f". The best weights, of step {best['step']}, are {self.checkpoints.store.folder / 'best'}" if best else "",
        )
        self._take_back_best(trainer)
        trainer.progress["guard"] = {**state, "stopped": trainer.step}
        trainer.stop()

    def _take_back_best(self, trainer: Trainer) -> None:
        """Leaves ``best`` what it is, whatever those who do not know of the damage have found."""
        if trainer.progress.get("is_best") and (best := distributed.broadcast_object(self._best())):
            kept = {key: best["progress"].get(key) for key in ("best_metric", "best_epoch")}
            trainer.progress.update(kept, is_best=False)
            logger.info("[Guard] the checkpoint best stays that of step %d", best["step"])

    def _best(self) -> Optional[dict[str, Any]]:
        """Step and progress of the checkpoint ``best``, if it is whole."""
        try:
            states = checkpoint.read_states(self.checkpoints.store.folder / "best")
        except CheckpointError as error:
            logger.debug("no best checkpoint: %s", error)
            return None
        return {"step": states["step"], "progress": states["progress"]}

    def _said(self, state: Mapping[str, Any]) -> str:
        if "best" in state:
            below = f"{state['damage']:.3f} points below the best, {state['best']:.3f}"
            return f"{state['metric']} is {state['value']:.3f}, {below} (max_drop {self.guard.max_drop:g})"
        value = f"{state['value']:.4f} (max_drift {self.guard.max_drift:g})"
        return f"{state['metric']} of the features is {value}, of teacher and student at most {state['coming']:.4f}"

    def _record(self, trainer: Trainer) -> None:
        state = trainer.progress["guard"]
        epoch = trainer.epoch + 1 if trainer.step else 0
        factor = trainer.progress.get("lr_factor", 1.0)
        values = {self.watch.name: state["value"], "damage": state["damage"], "coming": state["coming"]}
        values["limit"] = self.guard.limit
        values.update(rollbacks=state["rollbacks"], lr_factor=factor)
        self.log.record(trainer.step, {"epoch": epoch, **values}, "guard")

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the last step was measured."""
