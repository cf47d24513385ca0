"""What happens around the steps: logging and saving (evaluation: see evaluation.py)."""

from __future__ import annotations

import logging
import math
import resource
import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import paddle
from tqdm import tqdm

import passl
from passl import distributed
from passl.checkpoint import CheckpointStore
from passl.data.loader import Loader
from passl.engine.data_wait import DataWait, local_processes
from passl.engine.trainer import Trainer
from passl.log import Average, MetricsFile, duration
from passl.models.functional import tensor_of

logger = logging.getLogger("passl")


class LogHook:
    """The log line every ``interval`` steps and after each epoch, ``metrics.jsonl``, VisualDL scalars, one progress
    bar.

    Losses and metrics in a line are means over the steps since the line before and over all processes. ``data_wait``
    is the share of the time, between 0 and 1, that the process with the slowest data waited for it.

    Args:
        folder: gets ``metrics.jsonl`` and, with ``visualdl``, the folder ``vdl``.
        interval: optimizer steps between lines.

    Attributes:
        writer: VisualDL's, during the training, on the first process and where it is asked for.
        evaluation_seconds: what evaluations have taken since the start of this process.
    """

    def __init__(self, folder: Path, interval: int = 10, visualdl: bool = False) -> None:
        if interval < 1:
            raise ValueError(f"print_batch_step ({interval}) must be at least 1")
        self.folder = folder
        self.interval = interval
        self.visualdl = visualdl
        self._recent: dict[str, Average] = {}
        self._epoch: dict[str, Average] = {}
        self._pending: list[tuple[dict[str, paddle.Tensor], int]] = []
        self._batch_cost = Average()
        self._reader_cost = Average()
        self._samples = Average()
        self._wait: Optional[DataWait] = None
        self._epoch_wait = 0.0
        self._num_local_processes = 1
        self._file: Optional[MetricsFile] = None
        self.writer: Any = None
        self.evaluation_seconds = 0.0
        self._bar: Optional[tqdm] = None

    def before_train(self, trainer: Trainer) -> None:
        self._wait = DataWait(trainer.loader)
        self._num_local_processes = local_processes()
        if not distributed.is_main():
            return
        self._file = MetricsFile(self.folder / "metrics.jsonl", trainer.step)
        if self.visualdl:
            from visualdl import LogWriter  # it brings flask, pandas and matplotlib

            self.writer = LogWriter(logdir=str(self.folder / "vdl"))
        if sys.stderr.isatty():
            self._bar = tqdm(total=trainer.stop_step, initial=trainer.step, unit="step", dynamic_ncols=True)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.outputs:  # the step was not left out
            self._pending.append((trainer.outputs, trainer.batch_samples))
        self._batch_cost.update(trainer.batch_seconds)
        self._reader_cost.update(trainer.reader_seconds)
        self._wait.add(trainer.reader_seconds, trainer.batch_seconds)
        self._samples.update(trainer.batch_samples * distributed.world_size())
        # The first line comes after the first step, so that a wrong setting shows at once.
        step_in_epoch = (trainer.step - 1) % trainer.timeline.steps_per_epoch
        if step_in_epoch % self.interval == 0 or trainer.step == trainer.stop_step or trainer.at_epoch_end:
            self._print(trainer, step_in_epoch)
        if trainer.at_epoch_end:
            self._print_epoch(trainer)
            self._wait.end_epoch()
        if self._bar is not None:
            self._bar.update(1)

    def after_train(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.writer is not None:
            self.writer.close()

    def record(self, step: int, values: dict[str, Any], phase: str) -> None:
        """Write ``values`` of ``step`` to metrics.jsonl and VisualDL; only the first process does."""
        try:
            if self._file is not None:
                self._file.write(step, {"phase": phase, **values})
            if self.writer is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)) and name != "epoch":
                        self.writer.add_scalar(tag=f"{phase}/{name}", step=step, value=value)
        except OSError as error:  # a full disk: a line of the curves is not worth the run
            logger.error("the numbers of step %d were not written (%s); the run goes on", step, error)

    def _flush(self, loader: Loader) -> list[float]:
        """Read the scalars of the steps since the last line, from all processes: the only place that waits for the
        device, and for the other processes' unreadable files. Returns the `DataWait.shares` of the slowest.
        """
        names = list(self._pending[0][0]) if self._pending else []
        totals = paddle.zeros([len(names)])
        for outputs, size in self._pending:
            totals += paddle.stack([outputs[n].astype("float32") for n in names]) * size
        counts = [float(sum(size for _, size in self._pending)), float(loader.num_unshared_bad_samples)]
        shares = self._wait.shares()
        # A place for each process: the sum over processes is then a list of all.
        of_all = np.zeros((distributed.world_size(), len(shares)), np.float32)
        of_all[distributed.rank()] = shares
        numbers = tensor_of(np.float32([*counts, *of_all.ravel()]))
        values = distributed.all_reduce_sum_(paddle.concat([totals, numbers])).tolist()
        sums, (count, num_bad) = values[: len(names)], values[len(names) : len(names) + 2]
        if num_bad:
            loader.share_bad_samples(distributed.gather_objects)
        for name, total in zip(names, sums):
            for averages in (self._recent, self._epoch):
                averages.setdefault(name, Average()).update(total / count, int(count))
        self._pending.clear()
        return np.reshape(values[len(names) + 2 :], of_all.shape).max(axis=0).tolist()

    def _print(self, trainer: Trainer, step_in_epoch: int) -> None:
        data_wait, recent_wait, self._epoch_wait = self._flush(trainer.loader)
        metrics = {name: average.mean for name, average in self._recent.items()}
        batch_cost, reader_cost = self._batch_cost.mean, self._reader_cost.mean
        ips = self._samples.mean / batch_cost if batch_cost else 0.0
        parts = [f"lr: {trainer.values['lr']:.6f}"]
        parts += [f"{name}: {value:.5f}" for name, value in metrics.items() if name != "loss"]
        if skipped := trainer.progress.get("skipped_steps"):
            metrics["skipped_steps"] = skipped
        parts += [
            f"loss: {metrics.get('loss', math.nan):.5f}",
            f"batch_cost: {batch_cost:.5f} s",
            f"reader_cost: {reader_cost:.5f} s",
            f"ips: {ips:.5f} images/sec",
            f"max mem: {_peak_memory():.2f} GB",
            f"eta: {duration((trainer.stop_step - trainer.step) * batch_cost)}",
        ]
        place = (
            f"[Epoch {trainer.epoch + 1}/{trainer.epochs}][Iter: {step_in_epoch}/{trainer.timeline.steps_per_epoch}]"
        )
        logger.info("[Train]%s %s", place, ", ".join(parts))
        if verdict := self._wait.verdict(recent_wait, self._num_local_processes):
            logger.warning(verdict)
        speed = {"batch_cost": batch_cost, "reader_cost": reader_cost, "ips": ips, "data_wait": data_wait}
        self.record(trainer.step, {"epoch": trainer.epoch + 1, **metrics, **trainer.values, **speed}, "train")
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {metrics.get('loss', math.nan):.3f}, {ips:.1f} images/s", refresh=False)
        self._recent = {}
        self._batch_cost, self._reader_cost, self._samples = Average(), Average(), Average()

    def _print_epoch(self, trainer: Trainer) -> None:
        means = ", ".join(f"{name}: {average.mean:.5f}" for name, average in self._epoch.items())
        logger.info(
            "[Train][Epoch %d/%d][Avg] %s, data_wait: %.5f", trainer.epoch + 1, trainer.epochs, means, self._epoch_wait
        )
        self._epoch = {}


class CheckpointHook:
    """Saves every ``interval`` steps, at the end, and whenever a new best was found. Only the first process writes."""

    def __init__(self, store: CheckpointStore, interval: int, description: dict[str, Any]) -> None:
        self.store = store
        self.interval = interval
        self.description = description
        self._is_due_at_start = False

    def before_train(self, trainer: Trainer) -> None:
        if self._is_due_at_start:
            self.save(trainer, bool(trainer.progress.get("is_best")))

    def made_up_for(self, trainer: Trainer) -> None:
        """Told before the training by who measured what an interrupted run had left out: save what that changed, once
        the guard has seen it, too.
        """
        self._is_due_at_start = bool(trainer.progress.get("is_best")) or trainer.step == trainer.stop_step

    def after_step(self, trainer: Trainer) -> None:
        is_last = trainer.step == trainer.stop_step
        is_best = bool(trainer.progress.get("is_best"))
        if trainer.step % self.interval == 0 or is_last or is_best or trainer.is_interrupted:
            self.save(trainer, is_best)

    def save(self, trainer: Trainer, is_best: bool) -> bool:
        """Save now; False if the disk is full, which is an error only if no attempt follows that may succeed."""
        trainer.check_weights()  # on every process: they are equal, so all stop
        optimizer_state = trainer.optimizer.state_dict()  # on every process: each may hold a share
        if not distributed.is_main():
            return True
        try:
            _save(self.store, trainer, optimizer_state, self.description, best=is_best)
        except OSError as error:
            if trainer.step == trainer.stop_step or trainer.is_interrupted:
                raise type(error)(
                    error.errno,
                    f"step {trainer.step}, the last one, could not be saved ({error.strerror or error}). Last good "
                    f"checkpoint: {trainer.last_checkpoint or 'none'}. Make room, and go on with "
                    "-o Global.checkpoint=auto",
                    str(self.store.folder),
                ) from error
            logger.error(
                "checkpoint of step %d was not saved (%s); the run goes on, the next one will be tried",
                trainer.step,
                error,
            )
            return False
        trainer.last_checkpoint = self.store.folder / "latest"
        return True

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the last step was saved."""


def _save(
    store: CheckpointStore, trainer: Trainer, optimizer_state: dict[str, Any], description: dict[str, Any], best: bool
) -> None:
    """Write the trainer's whole state; ``description`` (config, world size ...) goes along."""
    name = f"epoch_{trainer.epoch + 1}" if trainer.at_epoch_end else f"step_{trainer.step}"
    states = {
        "step": trainer.step,
        "epoch": trainer.step // trainer.timeline.steps_per_epoch,
        "steps_per_epoch": trainer.timeline.steps_per_epoch,
        "global_batch_size": trainer.timeline.global_batch_size,
        "seed": trainer.seed,
        "scaler": trainer.precision.state_dict(),
        "progress": {k: v for k, v in trainer.progress.items() if k != "is_best"},
        "versions": {"passl": passl.__version__, "paddle": paddle.__version__},
        **description,
    }
    store.save(name, trainer.method.state_dict(), optimizer_state, states, best=best)


def _peak_memory() -> float:
    """Peak memory of this process in GB: on the GPU where there is one, else in RAM."""
    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**20 if sys.platform != "darwin" else kilobytes / 2**30
