"""The curves of a run, from its ``metrics.jsonl``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from passl.log import read_metrics

_LOSS, _METRIC, _BASELINE = "#2f6f9f", "#c2542d", "#555555"
_STYLES = ("--", ":", "-.")
_LINES = ("#c2542d", "#2f6f9f", "#5a8f3c", "#7a5aa0", "#b08a2e", "#4aa3a3")
_MOST_POINTS = 600  # of a drawn line
NOT_METRICS = ("step", "epoch", "phase", "early_stopping_counter", "early_stopping_stopped")


def plot_run(folder: Path, target: Path, metric: str, baselines: Optional[Mapping[str, float]] = None) -> Path:
    """Draw the training loss and one metric of a run over its epochs as a PNG.

    Args:
        folder: of the run, with its ``metrics.jsonl``.
        metric: a key of the evaluation rows, ``knn_top1_k20`` for example.
        baselines: label -> value of horizontal lines to compare with, in the metric's unit.

    Raises:
        ValueError: the file has no training rows or no such metric.
    """
    rows = list(read_metrics(folder / "metrics.jsonl"))
    train = [row for row in rows if row.get("phase") == "train"]
    measured = [row for row in rows if metric in row]
    if not train or not measured:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no {'training rows' if not train else metric} to draw")
    # Steps per epoch, for one axis over both panels.
    scale = max(row["step"] for row in train) / max(row["epoch"] for row in train)

    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] / scale for row in train], [row["loss"] for row in train], color=_LOSS)
    left.set(title="Training loss", xlabel="epoch")
    right.plot([row["step"] / scale for row in measured], [row[metric] for row in measured], "o-", color=_METRIC, ms=4)
    for (label, value), style in zip((baselines or {}).items(), itertools.cycle(_STYLES)):
        right.axhline(value, color=_BASELINE, ls=style, lw=1, label=f"{label}: {value:.1f}")
    right.set(title=f"{metric}, %", xlabel="epoch", xlim=left.get_xlim(), ylim=(0, None))
    if baselines:
        right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def draw_run(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The training loss, its parts and all that was measured over the epochs, as a matplotlib Figure; None without any
    rows.

    rows: of ``metrics.jsonl``.
    """
    train = [row for row in rows if row.get("phase") == "train" and "loss" in row]
    measured = [row for row in rows if row.get("phase") == "eval"]
    parts = dict.fromkeys(key for row in train for key in row if key.endswith("_loss"))
    panels = [("training loss", ["loss", *parts], train)] if train else []
    panels += [(title, keys, measured) for title, keys in metric_families(measured).items()]
    if train and "lr" in train[0]:
        panels.append(("learning rate", ["lr"], train))
    if not panels:
        return None

    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    count = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.7 * count), layout="constrained")
    scale = _steps_per_epoch(rows)
    grid = figure.subplots(count, columns, squeeze=False)
    for axes, (title, keys, source) in itertools.zip_longest(grid.flat, panels, fillvalue=("", [], [])):
        if not keys:
            axes.set_axis_off()
            continue
        for key, colour in zip(keys, itertools.cycle(_LINES)):
            points = [(row["step"] / scale, row[key]) for row in source if isinstance(row.get(key), (int, float))]
            if not points:
                continue
            points = points[:: math.ceil(len(points) / _MOST_POINTS)]
            style = "o-" if len(points) < 60 else "-"
            axes.plot(*zip(*points), style, color=colour, ms=3, lw=1.3, label=key.replace(title, "").strip("_") or key)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch" if scale > 1 else "step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=7)
    return figure


def metric_families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The measured numbers by what they are: ``knn_top1`` -> ``knn_top1_k10``, ``knn_top1_k20`` ..."""
    families: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key not in NOT_METRICS):
        if any(isinstance(row.get(key), (int, float)) for row in rows):
            families.setdefault(re.sub(r"_k\d+$", "", key), []).append(key)
    return families


def _steps_per_epoch(rows: Sequence[Mapping[str, Any]]) -> float:
    last = max(rows, key=lambda row: row["step"])
    return max(last["step"] / last["epoch"], 1.0) if last.get("epoch") else 1.0
