"""The doctor's visits to a run that goes on: measuring every so many steps, and a word when the verdict changes."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import paddle
from paddle import nn

from passl import distributed
from passl.data.image_io import UnreadableImageError
from passl.data.samples import ImageSamples, Samples
from passl.doctor.finding import HEALTHY, UNSTABLE, Finding
from passl.doctor.reading import LOSS_OF_VIEWS, PHASE
from passl.doctor.runs import Run, flattened, out_dim_of
from passl.doctor.verdict import diagnose
from passl.engine.hooks import LogHook
from passl.engine.trainer import Trainer
from passl.log import read_metrics
from passl.models.functional import tensor_of
from passl.yaml_io import parse

logger = logging.getLogger("passl")

_PIXELS = 1024  # of a sample, in its fingerprint
_MEMORY = 4096  # fingerprints of earlier samples
_MATRICES, _SLICE = 24, 4096  # weights whose change is measured, and elements of each
_PLACES = 2000  # of the schedule of the learning rate, in search of its top
_IMAGES = 8  # of the data set, compared once


class DiagnosisHook:
    """Measures every ``interval``-th step and the last, writes the numbers to metrics.jsonl and VisualDL, and warns in
    the log when the verdict changes. Numbers: see docs/doctor.md.

    The first step is measured too, as what the others are compared with; it is written with the first of them, so that
    a run of fewer steps than ``interval`` has no rows.

    Args:
        log: where rows are written.
        interval: optimizer steps.
        config: of the run, as YAML: what the advice says of the present values.
    """

    def __init__(self, log: LogHook, interval: int, config: str) -> None:
        self.log = log
        self.interval = interval
        settings = flattened(parse(config, "config.yaml"))
        self.run = Run(settings=settings, out_dim=out_dim_of(settings))
        self.finding = Finding(HEALTHY)
        self._is_begun = False  # whether there is a visit to compare with
        self._is_written = False  # whether it was written
        self._held: list[tuple[int, dict[str, Any]]] = []
        self._parts: list[str] = []
        self._losses: list[paddle.Tensor] = []
        self._waited = self._seconds = 0.0
        self._highest_lr = 0.0
        self._batch = BatchWatch()
        self._weights: Optional[WeightWatch] = None
        self.distinct_images: Optional[float] = None

    @property
    def is_due(self) -> bool:
        """Whether the coming step is measured."""
        return self._weights is not None

    def before_train(self, trainer: Trainer) -> None:
        if trainer.step and distributed.is_main():
            for row in read_metrics(self.log.folder / "metrics.jsonl"):
                if row.get("phase") == PHASE and row["step"] <= trainer.step:
                    self.run.add(row)
            if self.run.visits:
                self.finding = diagnose(self.run)
        self._is_begun = self._is_written = distributed.broadcast_object(bool(self.run.visits))
        total = trainer.timeline.total_steps
        places = np.unique(np.linspace(0, total - 1, min(total, _PLACES)).astype(np.int64))
        self._highest_lr = max(trainer.schedules["lr"](int(step)) for step in places)
        self._prepare(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.outputs:  # the step was not left out
            # Of a sum of several losses, the one that ln(out_dim) is a measure of.
            self._losses.append(trainer.outputs.get(LOSS_OF_VIEWS, trainer.outputs["loss"]))
        self._waited += trainer.reader_seconds
        self._seconds += trainer.batch_seconds
        if self.is_due:
            numbers = {**trainer.method.diagnostics(), **self._batch.numbers()}  # forgets what it kept, in any case
            if trainer.outputs:
                self._visit(trainer, numbers)
            self._weights = None
        self._prepare(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the last step was measured."""

    def _prepare(self, trainer: Trainer) -> None:
        """Has the coming step observed, if it is due."""
        if not self._is_begun or self._is_regular(trainer, trainer.step + 1):
            trainer.method.observe()
            self._batch.watch(trainer.method)
            self._weights = WeightWatch(trainer.optimizer.parameters)

    def _is_regular(self, trainer: Trainer, step: int) -> bool:
        return step % self.interval == 0 or (step == trainer.stop_step and self._is_written)

    def _visit(self, trainer: Trainer, numbers: dict[str, float]) -> None:
        run_numbers = self._run_numbers(trainer)
        numbers = {**run_numbers, **numbers, **self._gradient_norms(trainer), **self._weights.numbers()}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        is_written = self._is_regular(trainer, trainer.step)
        self._is_begun, self._is_written = True, self._is_written or is_written
        if not distributed.is_main():
            return
        if self.distinct_images is None:
            # Only now: a worker process that is started later would share the files that are opened here.
            self.distinct_images = distinct_images(trainer.loader.dataset)
        if math.isfinite(self.distinct_images):
            numbers["distinct_images"] = self.distinct_images
        row = {"epoch": trainer.epoch + 1, **trainer.values, **numbers}
        self.run.add({"step": trainer.step, **row})
        before, self.finding = self.finding, diagnose(self.run)
        row["verdict"] = self.finding.verdict
        if self.finding.verdict != before.verdict:
            row.update(evidence=self.finding.evidence, advice=self.finding.advice)
            self._tell(trainer)
        self._held.append((trainer.step, row))
        if is_written:
            self.write()

    def write(self) -> None:
        """Write what was measured and not written yet."""
        for step, row in self._held:
            self.log.record(step, row, PHASE)
        self._held.clear()

    def _tell(self, trainer: Trainer) -> None:
        if self.finding.verdict == HEALTHY:
            logger.info("[Doctor] step %d: the run is healthy again", trainer.step)
        else:
            logger.warning("[Doctor] step %d: %s", trainer.step, self.finding.text())

    def _gradient_norms(self, trainer: Trainer) -> dict[str, float]:
        if not self._parts:
            names = {id(parameter): name for name, parameter in trainer.method.named_parameters()}
            self._parts = [_part(names.get(id(parameter), "")) for parameter in trainer.optimizer.parameters]
        return gradient_norms(self._parts, trainer.gradient_norms)

    def _run_numbers(self, trainer: Trainer) -> dict[str, float]:
        """Loss and waiting since the last visit, over all processes."""
        losses = paddle.stack([loss.astype("float32").reshape([]) for loss in self._losses])
        size = float(distributed.world_size())
        losses = distributed.all_reduce_sum_(losses).numpy().astype(np.float64) / size
        share = self._waited / self._seconds if self._seconds else 0.0
        waits = distributed.all_gather(paddle.to_tensor([share], "float32")).numpy()
        self._losses, self._waited, self._seconds = [], 0.0, 0.0
        return {
            "progress": trainer.step / trainer.timeline.total_steps,
            "lr_share": trainer.values["lr"] / self._highest_lr if self._highest_lr else 0.0,
            "loss": float(losses.mean()),
            "loss_min": float(losses.min()),
            "loss_max": float(losses.max()),
            "data_wait": float(waits.max()),
        }


def record_failure(trainer: Trainer, error: Exception) -> None:
    """Has the doctor write down that a number that is not finite ended the run."""
    for hook in trainer.hooks:
        if isinstance(hook, DiagnosisHook):
            hook.write()
            row = {"epoch": trainer.epoch + 1, "verdict": UNSTABLE, "failure": str(error)}
            hook.log.record(trainer.step, row, PHASE)


class BatchWatch:
    """Whether batches hold new pixels: prints of samples, kept between visits."""

    def __init__(self) -> None:
        self._seen: deque[bytes] = deque(maxlen=_MEMORY)
        self._prints: list[bytes] = []
        self._handle: Any = None

    def watch(self, method: nn.Layer) -> None:
        """Looks at the batch of the coming forward call; of several calls, at the last one's."""
        if self._handle is None:
            self._handle = method.register_forward_pre_hook(self._look)

    def _look(self, _: nn.Layer, inputs: tuple) -> None:
        batch = inputs[0]
        images = next((x for name, x in batch.items() if name not in ("index", "label") and x.ndim > 1), None)
        if images is None:
            return
        count = batch["index"].shape[0] if "index" in batch else images.shape[0]
        first_views = images[:count].reshape([count, -1])
        columns = np.linspace(0, first_views.shape[1] - 1, min(_PIXELS, first_views.shape[1])).astype(np.int64)
        pixels = paddle.index_select(first_views, tensor_of(columns), axis=1).numpy()
        self._prints = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in pixels]

    def numbers(self) -> dict[str, float]:
        """Shares of the batch, between 0 and 1: samples that differ from each other, and samples seen at an earlier
        visit; means over all processes.
        """
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        prints, self._prints = self._prints, []
        if not prints:
            return {}
        seen = set(self._seen)
        shares = [len(set(prints)) / len(prints), sum(one in seen for one in prints) / len(prints)]
        self._seen.extend(prints)
        distinct, repeated = distributed.all_gather(paddle.to_tensor(shares, "float32")).mean(0).tolist()
        return {"distinct_samples": distinct, "repeated_samples": repeated}


class WeightWatch:
    """How far one optimizer step moves the weights, measured on slices of some matrices."""

    def __init__(self, parameters: Sequence[paddle.Tensor]) -> None:
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        chosen = np.unique(np.linspace(0, len(matrices) - 1, min(_MATRICES, len(matrices))).astype(np.int64))
        self._parameters = [matrices[place] for place in chosen]
        self._before = [_slice(parameter) for parameter in self._parameters]

    def numbers(self) -> dict[str, float]:
        """update_ratio: median over the matrices of |change| / |weight before|; those that did not move do not count.
        weight_rms: median over the matrices of the root mean square before the step.
        """
        sizes = [np.sqrt(np.mean(before**2)) for before in self._before]
        moves = [np.sqrt(np.mean((_slice(p) - before) ** 2)) for p, before in zip(self._parameters, self._before)]
        ratios = [move / max(size, 1e-12) for size, move in zip(sizes, moves) if move > 0]
        return {
            "update_ratio": float(np.median(ratios)) if ratios else 0.0,
            "weight_rms": float(np.median(sizes)) if sizes else 0.0,
        }


def _slice(parameter: paddle.Tensor) -> np.ndarray:
    rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
    kept = max(1, _SLICE // max(columns, 1))
    part = parameter.detach()
    return (part if kept >= rows else part[:kept]).astype("float32").numpy().astype(np.float64)


def gradient_norms(parts: Sequence[str], norms: Sequence[Optional[paddle.Tensor]]) -> dict[str, float]:
    """Of all gradients of the last step before clipping, and of each part of the parameters."""
    present = [(part, norm) for part, norm in zip(parts, norms) if norm is not None]
    if not present:
        return {"gradient_norm": 0.0}
    values = paddle.stack([norm for _, norm in present]).astype("float32").numpy().astype(np.float64)
    totals: dict[str, float] = {}
    for (part, _), value in zip(present, values):
        totals[part] = totals.get(part, 0.0) + float(value) ** 2
    own = {f"gradient_norm_{part}": math.sqrt(total) for part, total in totals.items()}
    return {"gradient_norm": math.sqrt(sum(totals.values())), **own}


def _part(name: str) -> str:
    """Of a parameter's name."""
    if "last_layer" in name:
        return "last_layer"
    return "backbone" if "backbone." in name else "head"


def distinct_images(dataset: Samples) -> float:
    """Share of distinct ones among some samples spread over a data set; NaN if fewer than two can be read."""
    indices = dataset.pool if dataset.pool is not None else np.arange(len(dataset))
    chosen = np.unique(np.linspace(0, len(indices) - 1, _IMAGES).astype(np.int64))
    prints = [_print_of(dataset, int(indices[place])) for place in chosen]
    found = [one for one in prints if one is not None]
    return len(set(found)) / len(found) if len(found) > 1 else math.nan


def _print_of(dataset: Samples, index: int) -> Optional[bytes]:
    try:
        if isinstance(dataset, ImageSamples) and type(dataset).content is ImageSamples.content:
            content: Mapping[str, Any] = {"image": dataset.load(index)}
        else:  # the same random numbers for every sample: equal ones stay equal
            content = dataset.content(index, np.random.default_rng(0))
    except (UnreadableImageError, OSError):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(content):
        array = np.ascontiguousarray(np.asarray(content[name]))
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.digest()
