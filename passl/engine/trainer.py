"""The training loop, read from top to bottom. It is handed built objects and never sees a configuration."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol

import numpy as np
import paddle
from paddle import nn

from passl import distributed
from passl.data.loader import Loader
from passl.engine.non_finite import NonFinite, NonFiniteLossError, explain
from passl.engine.optim import Optimizer
from passl.engine.precision import Precision
from passl.engine.roll_back import RollBack
from passl.models.functional import tensor_of
from passl.models.layers import running_statistics
from passl.models.method import Method
from passl.schedules import Schedule, Timeline

logger = logging.getLogger("passl")

Batch = Mapping[str, Any]
_OPTIMIZER_VALUES = ("lr", "weight_decay")


class Hook(Protocol):
    """What wants to be told. The end of an epoch is a step: ``trainer.at_epoch_end``."""

    def before_train(self, trainer: Trainer) -> None: ...

    def after_step(self, trainer: Trainer) -> None: ...

    def after_train(self, trainer: Trainer) -> None:
        """The end, or a :class:`RollBack`."""


class Trainer:
    """Trains a :class:`Method` to the end of its timeline.

    Args:
        schedules: name -> step -> value. ``lr`` and ``weight_decay`` drive the optimizer; every other name must be a
            keyword of the method's ``forward`` or ``after_step``.
        accum_steps: each batch is cut into this many micro-batches with one optimizer step after all of them. Loss,
            centre and EMA are those of the whole batch; batch norms see the micro-batches of all processes.
        stop_step: stop here although the schedules go on (None: at the end of the timeline).
        seed: random operations of step t draw from (seed, t, rank), so a resumed run needs no saved generator.
        non_finite: what to do when the loss or a gradient is infinite or NaN.
        is_told_to_stop: asked in each step; if it is True on one process, all stop after that step.

    Attributes:
        step: optimizer steps done, and steps left out (``progress["skipped_steps"]``).
        values: value of each schedule in the last step.
        outputs: what ``forward`` returned in the last step, as scalar tensors without gradient; empty if it was left
            out.
        gradient_norms: of each of ``optimizer.parameters`` in the last step, before clipping (None: no gradient).
        progress: what is kept with the checkpoint: of hooks (the best metric, for example), and of the trainer
            (``lr_factor``, which multiplies the scheduled learning rate).
        is_interrupted: whether the last step is the last one because a process was told to stop.
        last_checkpoint: prefix of what was resumed or saved last; the first process saves, and knows the latter.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        loader: Loader,
        schedules: Mapping[str, Schedule],
        timeline: Timeline,
        *,
        accum_steps: int = 1,
        precision: Optional[Precision] = None,
        hooks: Sequence[Hook] = (),
        stop_step: Optional[int] = None,
        seed: int = 0,
        non_finite: NonFinite = NonFinite(),  # noqa: B008 (frozen)
        is_told_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.method = method
        self.model = distributed.data_parallel(method)
        self.optimizer = optimizer
        self.loader = loader
        self.schedules = dict(schedules)
        self.timeline = timeline
        self.accum_steps = accum_steps
        self.precision = precision or Precision()
        self.hooks = list(hooks)
        self.stop_step = min(timeline.total_steps, stop_step or timeline.total_steps)
        self.seed = seed
        self.non_finite = non_finite
        self.is_told_to_stop = is_told_to_stop
        self.is_interrupted = False
        self.last_checkpoint: Optional[Path] = None
        self.step = 0
        self.values: dict[str, float] = {}
        self.outputs: dict[str, paddle.Tensor] = {}
        self.progress: dict[str, Any] = {}
        self.reader_seconds = 0.0
        self.batch_seconds = 0.0
        self.batch_samples = 0
        self.gradient_norms: list[Optional[paddle.Tensor]] = []
        self._forward_names, self._after_step_names = _match_schedules(method, self.schedules)

    @property
    def epoch(self) -> int:
        """Epoch of the last step (of the coming one before the first), from 0."""
        return max(self.step - 1, 0) // self.timeline.steps_per_epoch

    @property
    def epochs(self) -> int:
        return self.timeline.by_epoch.total_steps

    @property
    def at_epoch_end(self) -> bool:
        return self.step > 0 and self.step % self.timeline.steps_per_epoch == 0

    def fit(self) -> None:
        """Train from ``self.step`` to the end, or until a hook calls :meth:`stop`, or a process is told to.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite.
            RollBack: the run is to go on from an earlier checkpoint.
        """
        self.method.train()
        try:
            for hook in self.hooks:
                hook.before_train(self)
            self._steps()
        except RollBack:
            for hook in self.hooks:
                hook.after_train(self)
            raise
        for hook in self.hooks:
            hook.after_train(self)

    def _steps(self) -> None:
        started = time.perf_counter()
        for batch in self.loader.iterate(self.step, self.stop_step):
            self.reader_seconds = time.perf_counter() - started
            self.train_step(batch)
            self.batch_seconds = time.perf_counter() - started
            for hook in self.hooks:
                hook.after_step(self)
            if self.is_interrupted or self.step >= self.stop_step:  # a hook may have said so
                break
            # Evaluation and saving in hooks are not part of the next batch's time.
            started = time.perf_counter()

    def stop(self) -> None:
        """End the run with the step that was done last, as if it had been planned so; all processes must call this."""
        self.stop_step = self.step

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on ``batch``; every array holds V views of the B samples, view-major: [V*B, ...]."""
        self.values = {name: schedule(self.step) for name, schedule in self.schedules.items()}
        self.values["lr"] *= self.progress.get("lr_factor", 1.0)
        epoch = self.step // self.timeline.steps_per_epoch
        self.optimizer.set(self.values["lr"], self.values.get("weight_decay"))
        # Of a step that may have to be left out.
        statistics = running_statistics(self.method) if self.non_finite.policy == "skip" else []
        before = [tensor.clone() for tensor in statistics]
        self._forward_backward(batch)
        self.precision.unscale(self.optimizer)
        self.gradient_norms = self.optimizer.clip_gradients()
        is_finite, self.is_interrupted = self._agree()
        if is_finite:
            self.method.after_backward(epoch=epoch)
            self.precision.step(self.optimizer)
        else:
            self._skip_or_raise(batch)
            for tensor, value in zip(statistics, before):
                tensor.set_value(value)
        self.optimizer.clear_grad()
        if is_finite:
            self.method.after_step(**{name: self.values[name] for name in self._after_step_names})
        self.step += 1

    def _forward_backward(self, batch: Batch) -> None:
        self.batch_samples = len(batch["index"])
        self.outputs = {}
        parts = self._parts(batch)
        self._seed_step()
        for number, (part, share) in enumerate(parts):
            is_last = number == len(parts) - 1
            with distributed.synchronised(self.model, now=is_last):
                outputs = self._forward(self.model, part)
                self.precision.backward(outputs["loss"] * share if share != 1 else outputs["loss"])
            for name, value in outputs.items():
                weighted = value.detach() * share
                self.outputs[name] = self.outputs[name] + weighted if number else weighted

    def _parts(self, batch: Batch) -> list[tuple[dict[str, paddle.Tensor], float]]:
        return list(_micro_batches(batch, self.accum_steps))

    def _seed_step(self) -> None:
        paddle.seed(_step_seed(self.seed, self.step, distributed.rank()))

    def _forward(self, model: nn.Layer, part: Batch) -> dict[str, paddle.Tensor]:
        with self.precision.autocast():
            return model(part, **{name: self.values[name] for name in self._forward_names})

    def _agree(self) -> tuple[bool, bool]:
        """Whether loss and gradients are finite on all processes, and whether one of them was told to stop.

        The one place in a step that waits for the device: what is not finite must not reach the weights.
        """
        total = self.outputs["loss"].astype("float32")
        if not self.precision.overflow_is_normal():  # else the scaler sees to the gradients
            norms = [norm.astype("float32") for norm in self.gradient_norms if norm is not None]
            total = total + paddle.stack(norms).sum() if norms else total
        is_bad = 1 - paddle.isfinite(total).astype("float32")
        told = paddle.full([], float(self.is_told_to_stop()), "float32")
        num_bad, num_told = distributed.all_reduce_sum_(paddle.stack([is_bad, told])).tolist()
        return num_bad == 0, num_told > 0

    def _skip_or_raise(self, batch: Batch) -> None:
        report = self._report(batch)
        policy, lower = self.non_finite.policy, self.precision.lower()
        skipped = self.progress.get("skipped_steps", 0) + 1
        if policy == "skip" and skipped <= self.non_finite.max_skipped:
            logger.warning("%s; this step is left out (%d of at most %d)", report, skipped, self.non_finite.max_skipped)
            self.progress["skipped_steps"] = skipped
            self.method.after_skipped_step()
            self.outputs = {}
        elif policy == "fall_back" and lower:
            raise RollBack(f"{report}; falling back from {self.precision} to {lower}", progress={"precision": lower})
        else:
            limit = f" {skipped - 1} steps were left out before (max_skipped)." if policy == "skip" else ""
            again = (
                "Resume that checkpoint with -o Global.checkpoint=auto and" if self.last_checkpoint else "Start with"
            )
            raise NonFiniteLossError(
                f"{report}.{limit} {again} a lower Schedules.lr.base,"
                " a longer warm-up, a smaller Optimizer.clip_norm or FP16.level=O0, or set Global.non_finite.policy"
                " to skip or fall_back"
            )

    def _report(self, batch: Batch) -> str:
        loss, epoch = self.outputs["loss"].item(), self.step // self.timeline.steps_per_epoch + 1
        norms = [norm.item() for norm in self.gradient_norms if norm is not None]
        num_bad = sum(not np.isfinite(norm) for norm in norms)
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        self._seed_step()
        parts = [part for part, _ in self._parts(batch)]
        cause = explain(self.method, parts, lambda part: self._forward(self.method, part), self.loader.dataset.describe)
        self.last_checkpoint = distributed.broadcast_object(self.last_checkpoint)  # the first process saves
        return (
            f"loss or gradients are not finite at step {self.step} (epoch {epoch}): loss {loss}, {num_bad} of "
            f"{len(norms)} gradients bad; {cause}; {values}; {self.precision}, loss scale "
            f"{self.precision.loss_scale:g}; last good checkpoint: {self.last_checkpoint or 'none'}"
        )

    def check_weights(self) -> None:
        """Raises NonFiniteLossError when a weight is not finite: an infinite gradient can follow a finite loss."""
        bad = [p.name for p in self.optimizer.parameters if not np.isfinite(p.astype("float32").sum().item())]
        if bad:
            raise NonFiniteLossError(
                f"{len(bad)} weights became infinite or NaN by step {self.step} ({', '.join(bad[:5])}): not saved."
                " Resume the last checkpoint with -o Global.checkpoint=auto and a lower learning rate or"
                " Optimizer.clip_norm"
            )


def _match_schedules(method: Method, schedules: Mapping[str, Schedule]) -> tuple[list[str], list[str]]:
    """Names of the schedules that go to ``forward`` and to ``after_step``.

    Raises:
        ValueError: a schedule that nothing takes, or a keyword that needs a schedule and has none.
    """
    if "lr" not in schedules:
        raise ValueError("Schedules.lr is missing: the optimizer needs a learning rate")
    accepted: set[str] = set(_OPTIMIZER_VALUES)
    taken = []
    for function in (method.forward, method.after_step):
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "batch"]
        missing = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in schedules
        ]
        if missing:
            raise ValueError(
                f"{type(method).__name__} needs a schedule for {', '.join(missing)}: add Schedules.{missing[0]}"
            )
        names = [p.name for p in parameters if p.name in schedules]
        accepted.update(p.name for p in parameters)
        taken.append(names)
    unused = sorted(set(schedules) - accepted)
    if unused:
        known = ", ".join(sorted(accepted))
        raise ValueError(
            f"Schedules.{unused[0]}: nothing in {type(method).__name__} takes it; schedules it knows: {known}"
        )
    return taken[0], taken[1]


def _micro_batches(batch: Batch, count: int) -> Iterator[tuple[dict[str, paddle.Tensor], float]]:
    """``batch`` cut by samples into ``count`` parts as even as they can be, each with its share of the samples."""
    size = len(batch["index"])
    bounds = [round(size * part / count) for part in range(count + 1)]
    for start, stop in zip(bounds, bounds[1:]):
        if stop > start:
            yield (
                {name: _samples(value, size, start, stop) for name, value in batch.items()},
                (stop - start) / size,
            )


def _samples(value: Any, size: int, start: int, stop: int) -> paddle.Tensor:
    if stop - start == size:
        return value if isinstance(value, paddle.Tensor) else tensor_of(value)
    array = value.numpy() if isinstance(value, paddle.Tensor) else np.asarray(value)
    views = array.reshape(len(array) // size, size, *array.shape[1:])
    return tensor_of(np.ascontiguousarray(views[:, start:stop]).reshape(-1, *array.shape[1:]))


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0] & 0x7FFFFFFF)
