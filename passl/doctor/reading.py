"""Runs from what they left behind: our folders, the official code's log.txt, and logs with PASSL's lines."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Optional

from passl.doctor.runs import WITH_PROTOTYPES, Run, flattened, is_number, out_dim_of
from passl.yaml_io import ConfigError, parse

METRICS, CONFIG, OFFICIAL_LOG, TRAIN_LOG = "metrics.jsonl", "config.yaml", "log.txt", "train.log"
PHASE = "doctor"
LOSS_OF_VIEWS = "dino_loss"
_LINE = re.compile(r"\[Train\]\[Epoch (\d+)/\d+\]\[Iter: (\d+)/(\d+)\]\s*(.*)")
_NUMBER = re.compile(r"(\w+): ([-+]?(?:nan|inf|[\d.]+(?:[eE][-+]?\d+)?))(?: |,|$)")


class UnreadableRunError(ValueError):
    """Nothing that can be diagnosed: missing, empty, or another kind of file."""


def read_run(path: Path, out_dim: Optional[int] = None) -> Run:
    """The run that `path`, a folder or one of its files, describes.

    Args:
        out_dim: number of prototypes, if the file does not tell; it overrides what the file tells.

    Raises:
        UnreadableRunError: with what was expected.
    """
    file = _file_of(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableRunError(f"{file}: not UTF-8 text; {_EXPECTED}") from error
    except OSError as error:
        raise UnreadableRunError(f"{file}: {error.strerror}") from error
    if not text.strip():
        raise UnreadableRunError(f"{file}: empty: the run has not written anything yet")
    run = _from_lines(file, text) if _LINE.search(text) else _from_json(file, text)
    if out_dim is not None:
        run.out_dim = out_dim
    return run


_EXPECTED = (
    f"expected the folder of a run (with {METRICS}), a {METRICS}, a {OFFICIAL_LOG} of the official code "
    '({"train_loss": ..., "epoch": ...} on each line), or a log with lines [Train][Epoch 1/100][Iter: 0/1251] ... loss:'
)


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise UnreadableRunError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path
    for name in (METRICS, OFFICIAL_LOG, TRAIN_LOG):
        if (path / name).is_file():
            return path / name
    below = sorted(file.parent for file in path.glob(f"*/{METRICS}"))
    hint = f"; did you mean {', '.join(map(str, below[:5]))}?" if below else f"; {_EXPECTED}"
    raise UnreadableRunError(f"{path}: holds no {METRICS}, {OFFICIAL_LOG} or {TRAIN_LOG}{hint}")


def _from_json(file: Path, text: str) -> Run:
    rows, left_out = _json_rows(file, text)
    ours = [row for row in map(_readable, rows) if isinstance(row.get("phase"), str) and "step" in row]
    if ours:
        run = _ours(file, ours)
        run.left_out = left_out
        return run
    official = [row for row in rows if is_number(row.get("train_loss"))]
    if official:
        run = _official(official)
        run.left_out = left_out
        return run
    raise UnreadableRunError(f"{file}: no row has a loss; {_EXPECTED}")


def _json_rows(file: Path, text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The JSON objects, and the numbers of the lines before the last that are none. NaN and Infinity are numbers here,
    as Python writes them.

    A process that is killed leaves half a line, and the one that resumes writes on behind it: a few may be broken.
    """
    rows, broken = [], []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if len(broken) > len(rows):
        raise UnreadableRunError(f"{file}: line {broken[0]} is no JSON object; {_EXPECTED}")
    return rows, [number for number in broken if number < len(lines)]  # the last may be half written just now


def _ours(file: Path, rows: list[dict[str, Any]]) -> Run:
    settings = _settings(file.with_name(CONFIG))
    train = [_of_views(row) for row in rows if row["phase"] == "train" and "loss" in row]
    visits = _whole([row for row in rows if row["phase"] == PHASE])
    if not train and not visits:
        raise UnreadableRunError(f"{file}: no row of the phases train or {PHASE} has a loss")
    run = Run(curve=train, settings=settings, out_dim=out_dim_of(settings))
    run.has_labels = settings.get("Model.name", "DINO") not in WITH_PROTOTYPES or any("top1" in row for row in train)
    for row in visits:
        run.add(row)
    return run


def _of_views(row: dict[str, Any]) -> dict[str, Any]:
    """With the loss that ln(out_dim) is a measure of, in place of a sum with others that is finite."""
    return {**row, "loss": row[LOSS_OF_VIEWS]} if LOSS_OF_VIEWS in row and math.isfinite(row["loss"]) else row


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """What the rules may take for granted: texts, and finite numbers but for the losses; the rest is left out."""
    return {
        key: value
        for key, value in row.items()
        if (isinstance(value, str) if key in _TEXTS else is_number(value))
        and (key in _TEXTS or key in _LOSSES or math.isfinite(value))
    }


def _whole(visits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that lack a number which the others have."""
    if not any("teacher_entropy" in row for row in visits):
        return visits
    return [row for row in visits if "failure" in row or all(key in row for key in _ANSWERS)]


_TEXTS = ("phase", "verdict", "failure")
_LOSSES = ("loss", "loss_min", "loss_max")
_ANSWERS = ("loss", "teacher_entropy", "teacher_mean_entropy")


def _settings(file: Path) -> dict[str, Any]:
    """Of the run's configuration; {} without one that can be read: the verdict does without."""
    try:
        config = parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError, ConfigError):
        return {}
    return flattened(config) if isinstance(config, dict) else {}


def _official(rows: list[dict[str, Any]]) -> Run:
    by_epoch: dict[float, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        epoch = row["epoch"] if is_number(row.get("epoch")) and math.isfinite(row["epoch"]) else number
        by_epoch[epoch] = {  # a resumed run writes some epochs again
            "epoch": epoch,
            "loss": float(row["train_loss"]),
            **{ours: row[theirs] for ours, theirs in _OFFICIAL_NAMES if is_number(row.get(theirs))},
        }
    has_labels = any("test_acc1" in row or "test_loss" in row for row in rows)
    curve = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    return Run(curve=curve, is_by_epoch=True, is_official=True, has_labels=has_labels)


_OFFICIAL_NAMES = (("lr", "train_lr"), ("weight_decay", "train_wd"))


def _from_lines(file: Path, text: str) -> Run:
    rows = []
    for epoch, place, length, rest in _LINE.findall(text):
        numbers = {name: float(value) for name, value in _NUMBER.findall(rest)}
        if "loss" in numbers:
            step = (int(epoch) - 1) * int(length) + int(place) + 1
            rows.append(_of_views({"step": step, "epoch": int(epoch), **numbers}))
    if not rows:
        raise UnreadableRunError(f"{file}: no line [Train][Epoch ...][Iter: ...] has a loss; {_EXPECTED}")
    settings = _settings(file.with_name(CONFIG))
    has_labels = any("CELoss" in row or "top1" in row for row in rows)
    return Run(curve=rows, settings=settings, out_dim=out_dim_of(settings), has_labels=has_labels)
