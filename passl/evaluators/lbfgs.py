"""L-BFGS (Nocedal & Wright 2006, chapter 7) for smooth functions of many variables."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Optional

import numpy as np

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]

_MEMORY = 10  # pairs of steps and changes of the gradient
_DECREASE, _CURVATURE = 1e-4, 0.9  # of the Wolfe conditions
_TRIES = 60
_SHARE = 100.0
_SMALL = 1e-9  # of values below, rounding hides a share


def minimize(
    value_and_gradient: Function,
    start: np.ndarray,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    curvatures: Optional[np.ndarray] = None,
) -> tuple[np.ndarray, bool]:
    """Where no element of the gradient is larger than ``tolerance``, or as far as it comes.

    Args:
        value_and_gradient: x [N] -> value and gradient [N], float64.
        curvatures: [N], such that the function without ``sum(curvatures * x**2) / 2`` is convex. They tell how much
            lower the lowest value can be: no more than by a share of 100 * ``tolerance`` (of values from 1e-9). Where
            one is 0, the value itself stands for it, as is about right for a bias under a small cross-entropy.

    Returns:
        x, and whether it is as close as that.
    """

    def is_close() -> bool:
        if not np.abs(gradient).max() <= tolerance:
            return False
        if curvatures is None:
            return True
        least = max(value, _SMALL)
        room = float((gradient**2 / np.where(curvatures > 0, curvatures, least)).sum()) / 2
        return room <= _SHARE * tolerance * least

    x = np.array(start, np.float64)
    value, gradient = value_and_gradient(x)
    pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=_MEMORY)
    for _ in range(max_iterations):
        if is_close():
            return x, True
        direction = -_times_inverse(pairs, gradient)
        slope = float(gradient @ direction)
        if slope >= 0:  # rounding has spoilt the memory
            pairs.clear()
            direction, slope = -gradient, -float(gradient @ gradient)
        first = 1.0 if pairs else min(1.0, 1.0 / math.sqrt(-slope))
        step, new_value, new_gradient = _line_search(value_and_gradient, x, value, direction, slope, first)
        if step == 0:
            break
        change = new_gradient - gradient
        move = step * direction
        if (product := float(change @ move)) > 1e-300:
            pairs.append((move, change, product))
        x, value, gradient = x + move, new_value, new_gradient
    return x, is_close()


def _times_inverse(pairs: deque[tuple[np.ndarray, np.ndarray, float]], gradient: np.ndarray) -> np.ndarray:
    """The product of the inverse Hessian that ``pairs`` let one guess with ``gradient``."""
    result = gradient.copy()
    shares = []
    for move, change, product in reversed(pairs):
        shares.append(float(move @ result) / product)
        result -= shares[-1] * change
    if pairs:
        _, change, product = pairs[-1]
        result *= product / float(change @ change)
    for (move, change, product), share in zip(pairs, reversed(shares)):
        result += (share - float(change @ result) / product) * move
    return result


def _line_search(
    function: Function, x: np.ndarray, value: float, direction: np.ndarray, slope: float, step: float
) -> tuple[float, float, np.ndarray]:
    """A step that lowers the value enough and not too short (weak Wolfe conditions), by bisection; with value and
    gradient there. 0: there is none in floating point.
    """
    low, high = 0.0, math.inf
    for _ in range(_TRIES):
        new_value, gradient = function(x + step * direction)
        # Close to the minimum values differ by rounding only.
        if not new_value <= value + _DECREASE * step * slope + 1e-15 * abs(value):
            high = step
        elif float(gradient @ direction) < _CURVATURE * slope:
            low = step
        else:
            return step, new_value, gradient
        step = 2 * step if high == math.inf else (low + high) / 2
    return 0.0, value, x
