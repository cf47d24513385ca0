"""The curves of a run, from its ``metrics.jsonl``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from passl.log import read_metrics

_LOSS, _METRIC, _BASELINE = "#2f6f9f", "#c2542d", "#555555"
_STYLES = ("--", ":", "-.")


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
