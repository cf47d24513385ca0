"""Which classes are taken for which, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from passl.evaluators.metrics import balanced_accuracy, recalls
from passl.formats.atomic import replacing

_NUMBERED, _NAMED = 20, 60  # up to so many classes: numbers in the cells, names at the axes
_LISTED = 12
_RIGHT, _WRONG, _INK = "#1b7f5c", "#b3382c", "#333333"


def draw_confusion(confusion: np.ndarray, names: Sequence[str], target: Path) -> Path:
    """A PNG of the matrix [C, C] (rows: true classes), in percent of each row, for 2 to 1000 classes.

    Right ones are green, wrong ones red. With few classes each cell has its number; with many, where cells are smaller
    than a letter, the worst mistakes are listed beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    count = len(confusion)
    percent = 100.0 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(max(4.5, 1.8 + 0.42 * min(count, _NAMED) / (1 if count <= _NUMBERED else 2)), 14.0)
    figure = Figure(figsize=(side + 3.6, side + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes, beside = figure.subplots(1, 2, width_ratios=[side, 3.2])
    right = LinearSegmentedColormap.from_list("right", ["#ffffff", _RIGHT])
    wrong = LinearSegmentedColormap.from_list("wrong", ["#ffffff", _WRONG])
    is_right = np.eye(count, dtype=bool)
    # Mistakes are small numbers: by the square root even one percent is seen.
    pixels = np.where(is_right[..., None], right(percent / 100), wrong(np.sqrt(percent / 100)))
    if count > 2 * _NAMED:
        pixels = _swollen(pixels, percent, is_right, wrong)
    axes.imshow(pixels, interpolation="nearest", aspect="equal")
    _label_axes(axes, names, count)
    if count <= _NUMBERED:
        _write_numbers(axes, percent, confusion)
    axes.set_title(
        f"{100 * np.trace(confusion) / max(confusion.sum(), 1):.1f} % of {confusion.sum()} images right, "
        f"{balanced_accuracy(confusion):.1f} % in the mean of classes",
        fontsize=10, color=_INK,
    )  # fmt: skip
    _list_worst(beside, confusion, percent, names)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)
    return target


def _swollen(pixels: np.ndarray, percent: np.ndarray, is_right: np.ndarray, wrong: Any) -> np.ndarray:
    """Single cells are smaller than a pixel of the screen then: the larger mistakes become dots of 3 x 3."""
    pixels = pixels.copy()
    count = len(percent)
    reach = count // 400
    mistakes = np.argwhere((percent > 5) & ~is_right)
    for row, column in mistakes[np.argsort(percent[tuple(mistakes.T)])] if len(mistakes) else ():
        rows = slice(max(row - reach, 0), row + reach + 1)
        columns = slice(max(column - reach, 0), column + reach + 1)
        pixels[rows, columns] = wrong(np.sqrt(percent[row, column] / 100))
    diagonal = np.argwhere(np.abs(np.subtract.outer(np.arange(count), np.arange(count))) <= reach)
    for row, column in diagonal[(diagonal[:, 0] != diagonal[:, 1])] if reach else ():
        pixels[row, column] = pixels[row, row]
    return pixels


def _label_axes(axes: Any, names: Sequence[str], count: int) -> None:
    if count <= _NAMED:
        size = 9 if count <= _NUMBERED else 6.5
        shown = [_short(name, 18) for name in names]
        axes.set_xticks(range(count), shown, rotation=90 if max(map(len, shown)) > 2 else 0, fontsize=size)
        axes.set_yticks(range(count), shown, fontsize=size)
    axes.set_xlabel("predicted class", color=_INK)
    axes.set_ylabel("true class", color=_INK)
    axes.tick_params(length=0 if count <= _NAMED else 3, colors=_INK)
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def _write_numbers(axes: Any, percent: np.ndarray, confusion: np.ndarray) -> None:
    size = 9 if len(percent) <= 12 else 7
    for row, column in np.argwhere(confusion > 0):
        value = percent[row, column]
        is_dark = value > (60 if row == column else 30)
        text = f"{value:.0f}" if value >= 0.95 else "<1"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if is_dark else _INK)


def _list_worst(axes: Any, confusion: np.ndarray, percent: np.ndarray, names: Sequence[str]) -> None:
    axes.axis("off")
    lines = ["Least often right"]
    accuracy = recalls(confusion)
    for label in np.argsort(np.where(np.isnan(accuracy), np.inf, accuracy), kind="stable")[:_LISTED]:
        if accuracy[label] < 100:  # also not NaN
            lines.append(f"{accuracy[label]:5.1f} %  {_short(names[label])}")
    lines += ["", "Most often taken for another"]
    wrong = np.where(np.eye(len(percent), dtype=bool), 0.0, percent)
    for cell in np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]:
        row, column = divmod(int(cell), len(percent))
        if wrong[row, column] > 0:
            lines.append(f"{wrong[row, column]:5.1f} %  {_short(names[row], 14)} → {_short(names[column], 14)}")
    # Names may hold what would be a formula.
    text = "\n".join(lines).replace("$", r"\$")
    axes.text(0, 1, text, va="top", fontsize=8, family="monospace", color=_INK, transform=axes.transAxes)


def _short(name: str, length: int = 22) -> str:
    """The beginning and the end of a name that is too long: classes often differ in their numbers."""
    head = (length - 1) // 2
    return name if len(name) <= length else f"{name[:head]}…{name[head + 1 - length :]}"
