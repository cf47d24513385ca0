"""A short real run, in a process of its own: what it measures is true of the run itself."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from passl.processes import end_with

_SCORE = Path("/proc/self/oom_score_adj")
_TIMED_IMAGES = 64
_STATUS = "/proc/{}/status"


@dataclass(frozen=True)
class Trial:
    """What to try.

    Attributes:
        config: a whole configuration, whose output folder is the trial's own.
        steps: optimizer steps.
        counts: do not train; count the bytes that one image keeps for the backward pass.
        started: seconds since the epoch, when the process was started.
    """

    config: dict[str, Any]
    steps: int
    counts: bool
    started: float


def main(trial: Trial, folder: Path) -> None:
    """Entry of the process: writes ``result.json`` to ``folder``, and what is printed to ``log.txt``."""
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if not end_with(multiprocessing.parent_process().pid, signal.SIGKILL):
            return
        if _SCORE.exists():
            _SCORE.write_text("1000", encoding="ascii")  # short of memory, the kernel ends this process, not another
        try:
            found = _count(trial) if trial.counts else _train(trial)
        # Whatever a configuration, a file or a device can raise: the parent shows it.
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
    partial = folder / "result.partial"
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(folder / "result.json")


def _train(trial: Trial) -> dict[str, Any]:
    """Costs in seconds and bytes. ``steps``: of each; ``wall``: from the process's start to the end of training.

    ``evaluating``: of each image, and of starting.
    """
    from passl.config import Config
    from passl.engine import build, run
    from passl.engine.hooks import CheckpointHook
    from passl.log import read_metrics

    config = copy.deepcopy(trial.config)
    config["Global"].update(max_train_step=trial.steps, print_batch_step=1, eval_during_train=False)
    source = Config(config, {(): "the proposed plan"})
    ready = run.checked(source, training=True)
    idle = 0.0 if config["Global"]["device"] == "gpu" else memory_of("self") or 0.0
    trainer = run.train(ready, source)
    wall = time.time() - trial.started
    peak = _peak()
    folder = Path(config["Global"]["output_dir"]) / config["Global"]["name"]
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get("phase") == "train"]
    checkpoints = next(hook for hook in trainer.hooks if isinstance(hook, CheckpointHook))
    started = time.perf_counter()
    checkpoints.save(trainer, is_best=False)
    saving = time.perf_counter() - started
    return {
        "steps": [row["batch_cost"] for row in rows],
        "waits": [row["reader_cost"] for row in rows],
        "wall": wall,
        "saving": saving,
        "evaluating": _evaluating(build.evaluators(ready, trainer.method), trainer.method, folder),
        "idle": idle,
        "peak": peak,
        "peak_evaluating": _peak(),
        "loading_rate": _loading_rate(ready),
        **_sizes(trainer.method),
    }


def _evaluating(evaluators: Sequence[Any], method: Any, folder: Path) -> tuple[float, float]:
    """Seconds for an image, and to start; ``evaluators``: one with few images, one with many, or none."""
    from passl.evaluators import evaluate

    points = []
    for evaluator in evaluators:
        started = time.perf_counter()
        evaluate(evaluator, method, folder)
        seconds = time.perf_counter() - started
        points.append((len(evaluator.train_dataset) + len(evaluator.val_dataset), seconds))
    if not points:
        return 0.0, 0.0
    (few, short), (many, long) = points[0], points[-1]
    per_image = max(long - short, 0.0) / (many - few) if many > few else long / many
    return per_image, max(long - per_image * many, 0.0)


def _count(trial: Trial) -> dict[str, Any]:
    """Bytes of the weights, and those that a forward pass of one image keeps for the backward pass, in float32."""
    import paddle
    from paddle.base import core

    from passl.config import Config
    from passl.engine import build, run

    config = run.checked(Config(trial.config, {(): "the proposed plan"}), training=True)
    run.set_up(build.global_settings(config))
    method = build.model(config)
    loader = build.train_loader(config, 0)
    method.train()
    batch = next(iter(loader.iterate(0, 1)))
    tensors = {name: paddle.to_tensor(value) for name, value in batch.items()}
    before = core.host_memory_stat_current_value("Allocated", 0)
    outputs = method(tensors, teacher_temp=0.04)
    kept = core.host_memory_stat_current_value("Allocated", 0) - before
    outputs["loss"].item()
    views = sum(value.size * 4 for name, value in tensors.items() if name.endswith("crops"))
    return {"kept": (kept + views) / len(batch["index"]), **_sizes(method)}


def _sizes(method: Any) -> dict[str, float]:
    """Bytes of all weights, and of those that are trained."""
    return {
        "weights": float(sum(p.size * 4 for p in method.parameters())),
        "trained": float(sum(p.size * 4 for p in method.parameters() if not p.stop_gradient)),
    }


def _loading_rate(config: Any) -> float:
    """Images a second that the configuration's loader gives when nobody else computes."""
    from passl.engine import build

    loader = build.train_loader(config, 0)
    skipped = max(loader.num_workers, 1)  # these start together and say nothing about what follows
    wanted = max(2 * skipped, -(-_TIMED_IMAGES // loader.sampler.batch_size))
    times, count = [], 0
    for number, batch in enumerate(loader.iterate(0, skipped + wanted)):
        times.append(time.perf_counter())
        count += len(batch["index"]) if number >= skipped else 0
    return count / max(times[-1] - times[skipped - 1], 1e-9)


def _peak() -> float:
    """Peak memory of this process in bytes: on the GPU where it computes there, else in RAM."""
    import paddle

    if paddle.get_device().startswith("gpu"):
        return float(paddle.device.cuda.max_memory_allocated())
    own = memory_of("self", "VmHWM")
    if own is not None:
        return own
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(size if sys.platform == "darwin" else size * 1024)


def memory_of(process: object, key: str = "VmRSS") -> Optional[float]:
    """Bytes of a process by its number, as Linux counts them; None where that is not known."""
    try:
        with open(_STATUS.format(process), encoding="utf-8", errors="replace") as file:
            sizes = dict(line.split(":", 1) for line in file if line.startswith("Vm"))
    except OSError:
        return None
    return float(sizes[key].split()[0]) * 1024 if key in sizes else None
