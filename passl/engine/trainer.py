"""The training loop, read from top to bottom. It is handed built objects and never sees a configuration."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Protocol

import numpy as np
import paddle

from passl import distributed
from passl.data.loader import Loader
from passl.engine.optim import Optimizer
from passl.engine.precision import Precision
from passl.models.method import Method
from passl.schedules import Schedule, Timeline

Batch = Mapping[str, Any]
_OPTIMIZER_VALUES = ("lr", "weight_decay")


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; nothing was saved since the last good checkpoint."""


class Hook(Protocol):
    """What wants to be told. The end of an epoch is a step: ``trainer.at_epoch_end``."""

    def before_train(self, trainer: Trainer) -> None: ...

    def after_step(self, trainer: Trainer) -> None: ...

    def after_train(self, trainer: Trainer) -> None: ...


class Trainer:
    """Trains a :class:`Method` to the end of its timeline.

    Args:
        schedules: name -> step -> value. ``lr`` and ``weight_decay`` drive the optimizer; every other name must be a
            keyword of the method's ``forward`` or ``after_step``.
        accum_steps: each batch is cut into this many micro-batches with one optimizer step after all of them. Loss,
            centre and EMA are those of the whole batch; batch norms see the micro-batches of all processes.
        stop_step: stop here although the schedules go on (None: at the end of the timeline).
        seed: random operations of step t draw from (seed, t, rank), so a resumed run needs no saved generator.

    Attributes:
        step: optimizer steps done.
        values: value of each schedule in the last step.
        outputs: what ``forward`` returned in the last step, as scalar tensors without gradient.
        progress: numbers that hooks keep with the checkpoint (the best metric, for example).
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
        self.step = 0
        self.values: dict[str, float] = {}
        self.outputs: dict[str, paddle.Tensor] = {}
        self.progress: dict[str, Any] = {}
        self.reader_seconds = 0.0
        self.batch_seconds = 0.0
        self.batch_samples = 0
        self.gradient_norms: list[Optional[paddle.Tensor]] = []
        self._unchecked_loss: Optional[paddle.Tensor] = None
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
        """Train from ``self.step`` to the end, or until a hook calls :meth:`stop`.

        Raises:
            NonFiniteLossError: the loss is not finite.
        """
        self.method.train()
        for hook in self.hooks:
            hook.before_train(self)
        started = time.perf_counter()
        for batch in self.loader.iterate(self.step, self.stop_step):
            self.reader_seconds = time.perf_counter() - started
            self.train_step(batch)
            self.batch_seconds = time.perf_counter() - started
            for hook in self.hooks:
                hook.after_step(self)
            if self.step >= self.stop_step:  # a hook may have said so
                break
            # Evaluation and saving in hooks are not part of the next batch's time.
            started = time.perf_counter()
        self.check_finite()
        for hook in self.hooks:
            hook.after_train(self)

    def stop(self) -> None:
        """End the run with the step that was done last, as if it had been planned so; all processes must call this."""
        self.stop_step = self.step

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on ``batch``; every array holds V views of the B samples, view-major: [V*B, ...]."""
        self.check_finite()
        self.values = {name: schedule(self.step) for name, schedule in self.schedules.items()}
        epoch = self.step // self.timeline.steps_per_epoch
        paddle.seed(_step_seed(self.seed, self.step, distributed.rank()))
        self.optimizer.set(self.values["lr"], self.values.get("weight_decay"))
        self._forward_backward(batch)
        self.precision.unscale(self.optimizer)
        self.gradient_norms = self.optimizer.clip_gradients()
        self.method.after_backward(epoch=epoch)
        self.precision.step(self.optimizer)
        self.optimizer.clear_grad()
        self.method.after_step(**{name: self.values[name] for name in self._after_step_names})
        self.step += 1

    def _forward_backward(self, batch: Batch) -> None:
        values = {name: self.values[name] for name in self._forward_names}
        self.batch_samples = len(batch["index"])
        self.outputs = {}
        parts = list(_micro_batches(batch, self.accum_steps))
        for number, (part, share) in enumerate(parts):
            is_last = number == len(parts) - 1
            with distributed.synchronised(self.model, now=is_last):
                with self.precision.autocast():
                    outputs = self.model(part, **values)
                self._unchecked_loss = outputs["loss"].detach()
                if paddle.get_device() == "cpu":
                    # Elsewhere reading it now would stall the queue: it is read one step later, before anything is
                    # saved.
                    self.check_finite()
                self.precision.backward(outputs["loss"] * share if share != 1 else outputs["loss"])
            for name, value in outputs.items():
                weighted = value.detach() * share
                self.outputs[name] = self.outputs[name] + weighted if number else weighted

    def check_finite(self) -> None:
        """Raises NonFiniteLossError when the newest loss is not finite."""
        if self._unchecked_loss is None:
            return
        loss = self._unchecked_loss.item()
        self._unchecked_loss = None
        if not np.isfinite(loss):
            values = ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())
            epoch = self.step // self.timeline.steps_per_epoch + 1
            raise NonFiniteLossError(
                f"the loss is {loss} at step {self.step} (epoch {epoch}); {values}."
                " Nothing was saved since the last checkpoint: resume it with -o Global.checkpoint=auto and a lower"
                " learning rate, a longer warm-up, a smaller Optimizer.clip_norm, or FP16.level=O0"
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
        return value if isinstance(value, paddle.Tensor) else paddle.to_tensor(value)
    array = value.numpy() if isinstance(value, paddle.Tensor) else np.asarray(value)
    views = array.reshape(len(array) // size, size, *array.shape[1:])
    return paddle.to_tensor(np.ascontiguousarray(views[:, start:stop]).reshape(-1, *array.shape[1:]))


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0] & 0x7FFFFFFF)
