"""A run as the rules see it, whatever it was read from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

Row = Mapping[str, Any]
_MAX_VISITS = 400
WITH_PROTOTYPES = ("DINO", "DINOv2")
_DEFAULT_OUT_DIM = 65536  # of DINOHead


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        visits: the doctor's rows, in order of their `step`.
        curve: rows with `loss` and, where known, `step`, `epoch`, `lr`, `data_wait`.
        settings: dotted key -> value of the run's configuration.
        out_dim: number of prototypes, where it is known.
        is_by_epoch: rows of `curve` are means of epochs.
        is_official: a log.txt of the official code, whose settings have other names.
        has_labels: a run that learns labels: its loss has no ln(out_dim).
        failure: what ended the run, if that was a number that is not finite.
        left_out: numbers of the lines of its file that could not be read.
    """

    visits: list[Row] = field(default_factory=list)
    curve: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    out_dim: Optional[int] = None
    is_by_epoch: bool = False
    is_official: bool = False
    has_labels: bool = False
    failure: str = ""
    left_out: list[int] = field(default_factory=list)

    def add(self, visit: Row) -> None:
        """One more visit. Of a long run every second one of the older half is forgotten."""
        if "failure" in visit:
            self.failure = str(visit["failure"])
            return
        self.failure = ""  # it was resumed
        if "out_dim" in visit:
            self.out_dim = int(visit["out_dim"])
        self.visits.append(visit)
        if len(self.visits) > _MAX_VISITS:
            half = _MAX_VISITS // 2
            self.visits[1:half] = self.visits[2:half:2]  # never the first, which growth is measured against

    @property
    def has_entropies(self) -> bool:
        return bool(self.visits) and "teacher_entropy" in self.visits[-1]

    @property
    def uniform(self) -> float:
        """ln(out_dim), the loss and entropy of a uniform answer."""
        return math.log(self.out_dim) if self.out_dim and self.out_dim > 1 else math.nan

    @property
    def last_step(self) -> int:
        rows = self.visits or self.curve
        return int(rows[-1].get("step", 0)) if rows else 0


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def out_dim_of(settings: Mapping[str, Any]) -> Optional[int]:
    """Number of prototypes that a configuration asks for; None if it trains no DINO."""
    if settings.get("Model.name") not in WITH_PROTOTYPES:
        return None
    value = settings.get("Model.head.out_dim", _DEFAULT_OUT_DIM)
    return value if isinstance(value, int) and value > 1 else None


def values(rows: Iterable[Row], key: str) -> list[float]:
    """The finite values of `key`, in order."""
    found = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return [float(value) for value in found if math.isfinite(value)]


def is_number(value: Any) -> bool:
    """Whether it is one that a float can hold; integers may have more digits. True and False are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def trailing(rows: Sequence[Row], holds: Callable[[Row], bool]) -> list[Row]:
    """The last rows for all of which something holds."""
    found: list[Row] = []
    for row in reversed(rows):
        if not holds(row):
            break
        found.append(row)
    return found[::-1]
