"""Checks of what transforms are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Union

Size = Union[int, Sequence[int]]


def height_and_width(size: Size, name: str = "size") -> tuple[int, int]:
    """`size` as `(height, width)`; an int is a square. `name` is the argument's name for the error."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name} must be a positive int or [height, width], not {size!r}")
    return sides


def positive_range(values: Sequence[float], name: str, highest: float = math.inf) -> tuple[float, float]:
    """`values` as `(low, high)`, checked: `0 < low <= high <= highest`."""
    values = tuple(values)
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest:
        limit = "" if highest == math.inf else f" <= {highest}"
        raise ValueError(f"{name} must be [low, high] with 0 < low <= high{limit}, not {list(values)}")
    return values


def probability(value: float, name: str) -> float:
    """`value`, checked to lie in 0..1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a probability between 0 and 1, not {value!r}")
    return value


def check_jitter_strengths(brightness: float, contrast: float, saturation: float, hue: float) -> None:
    """Raise ValueError unless the first three are at least 0 and the hue lies in 0..0.5."""
    for name, strength in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        if strength < 0:
            raise ValueError(f"{name} must be at least 0, not {strength!r}")
    if not 0 <= hue <= 0.5:
        raise ValueError(f"hue must be between 0 and 0.5, not {hue!r}")
