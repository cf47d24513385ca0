"""Resizing and blurring along one axis as banded matrices: for each row the few columns with a weight.

For many views at once, in numpy. A band is (first [V, n], weights [V, n, taps]): row i of view v has its weights in the
columns first[v, i] ... first[v, i] + taps - 1. Float64 inside, because positions are added to weights; float32 outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from passl.cubic import cubic_weights
from passl.data.backends.pixels import box_extent

Band = tuple[np.ndarray, np.ndarray]


def resize_band(starts: np.ndarray, lengths: np.ndarray, mirrored: np.ndarray, length: int, size: int) -> Band:
    """Antialiased bicubic resizing, as Pillow's, of parts of an axis to ``size`` pixels.

    Args:
        starts, lengths: first pixel and number of pixels of each view's part [V].
        mirrored: whether the result runs backwards, bool [V].
        length: pixels of the whole axis.
    """
    scale = (lengths / size)[:, None]
    widening = np.maximum(scale, 1.0)
    place = np.where(mirrored[:, None], np.arange(size)[::-1], np.arange(size))
    center = starts[:, None] + scale * (place + 0.5)
    taps = min(length, 2 * math.ceil(2 * widening.max()) + 1)
    first = np.clip(np.floor(center - 2 * widening).astype(np.int64), 0, length - taps)
    columns = first[..., None] + np.arange(taps)
    weights = cubic_weights(np.abs(columns + 0.5 - center[..., None]) / widening[..., None], -0.5)
    # Pixels around the box have no part in it.
    starts, ends = starts[:, None, None], (starts + lengths)[:, None, None]
    weights *= (columns >= starts) & (columns < ends)
    return first, (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def box_blur_band(radii: Sequence[float], size: int) -> Band:
    """Pillow's Gaussian blur with these standard deviations [V], but for its rounding: three box blurs, each of which
    repeats the outermost pixels."""
    extents = [box_extent(radius) for radius in radii]
    reach = max(whole for whole, _ in extents) + 1
    half = np.array([whole + fraction + 0.5 for whole, fraction in extents])[:, None]
    # What a box of this half width covers of the pixels around its middle.
    covered = np.clip(half + 0.5 - np.abs(np.arange(-reach, reach + 1)), 0.0, 1.0)
    return _band_of_kernels(covered, size, times=3)


def gaussian_band(radii: Sequence[float], size: int) -> Band:
    """OpenCV's Gaussian blur, as ``passl.data.arrays.blur_planes`` has it."""
    sigma = np.asarray(radii)[:, None]
    reach = math.ceil(4 * sigma.max())
    distance = np.abs(np.arange(-reach, reach + 1))
    weights = np.exp(-0.5 * (distance / sigma) ** 2) * (distance <= np.ceil(4 * sigma))
    return _band_of_kernels(weights, size, times=1)


def _band_of_kernels(kernels: np.ndarray, size: int, times: int) -> Band:
    """Convolution with each of ``kernels`` [V, 2 * reach + 1], borders repeated, so many times."""
    reach = kernels.shape[1] // 2
    wide = times * reach
    # Rows further than that from both ends are all alike: they are made once, in a small matrix.
    small = min(size, 4 * wide + 1)
    matrix = np.zeros((len(kernels), small, small))
    rows = np.arange(small)
    for offset in range(-reach, reach + 1):
        # Each row once in an assignment, so += meets no column of it twice.
        matrix[:, rows, np.clip(rows + offset, 0, small - 1)] += kernels[:, [reach + offset]]
    matrix = np.linalg.matrix_power(matrix / matrix.sum(-1, keepdims=True), times)
    places = np.arange(size)
    taps = min(size, 2 * wide + 1)
    rows = np.minimum(places, small - 1) if small == size else _row_like(places, size, 2 * wide)
    columns = np.clip(rows - wide, 0, small - taps)[:, None] + np.arange(taps)
    first = np.broadcast_to(np.clip(places - wide, 0, size - taps), (len(kernels), size))
    return first, matrix[:, rows[:, None], columns].astype(np.float32)


def _row_like(places: np.ndarray, size: int, middle: int) -> np.ndarray:
    """The row of the small matrix, of 2 * middle + 1 rows, that is like each row of the large one."""
    return np.minimum(places, middle) + np.maximum(0, places - (size - 1 - middle))
