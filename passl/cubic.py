"""The kernel of cubic convolution: for resizing images and position embeddings alike."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Numbers = TypeVar("Numbers")  # numpy arrays and tensors


def cubic_weights(distance: np.ndarray, a: float) -> np.ndarray:
    """The weight of a point at this distance (>= 0) in cubic convolution (Keys 1981); a: slope at distance 1."""
    near, far = cubic_parts(distance, a)
    return np.where(distance <= 1.0, near, np.where(distance < 2.0, far, 0.0))


def cubic_parts(distance: Numbers, a: float) -> tuple[Numbers, Numbers]:
    """The two pieces of the kernel: for distances up to 1, and from 1 to 2."""
    near = ((a + 2.0) * distance - (a + 3.0)) * distance**2 + 1.0
    far = a * (((distance - 5.0) * distance + 8.0) * distance - 4.0)
    return near, far
