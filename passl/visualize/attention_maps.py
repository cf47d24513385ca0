"""From maps of patches [h, w] to pixels: upsampling, masks by mass, colours."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

MASK_COLOUR = (255, 64, 32)
_MASK_OPACITY = 0.5


def upsampled(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """[..., h, w] -> [..., height, width]: each pixel has its patch's value."""
    rows = np.arange(height) * maps.shape[-2] // height
    columns = np.arange(width) * maps.shape[-1] // width
    return maps[..., rows[:, None], columns[None, :]]


def top_mass_masks(maps: np.ndarray, threshold: float) -> np.ndarray:
    """The fewest patches of each map that hold about ``threshold`` of its sum: [heads, h, w] -> bool [heads, h, w].

    The official rule: in ascending order, those are kept at which the cumulative share is above 1 - threshold.
    """
    flat = maps.reshape(len(maps), -1).astype(np.float32)
    order = np.argsort(flat, axis=1, kind="stable")
    values = np.take_along_axis(flat, order, axis=1)
    shares = np.cumsum(values / np.maximum(values.sum(1, keepdims=True), 1e-30), axis=1)
    kept = np.zeros(flat.shape, bool)
    np.put_along_axis(kept, order, shares > 1 - threshold, axis=1)
    return kept.reshape(maps.shape)


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``values`` in 0..1 between ``low`` and ``high``; zeros where these are equal."""
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


def coloured(values: np.ndarray, cmap: str = "viridis") -> np.ndarray:
    """Values in 0..1 [H, W] by a colour map of matplotlib: uint8 [H, W, 3].

    Raises:
        ValueError: there is no such colour map.
    """
    return _table(cmap)[(np.asarray(values) * 255.0 + 0.5).astype(np.uint8)]


def _table(cmap: str) -> np.ndarray:
    """uint8 [256, 3]"""
    import matplotlib  # a quarter of a second, which not every command needs

    if cmap not in matplotlib.colormaps:
        raise ValueError(f"cmap ({cmap!r}) must be a colour map of matplotlib, such as viridis, inferno or gray")
    return (matplotlib.colormaps[cmap](np.arange(256) / 255.0)[:, :3] * 255.0 + 0.5).astype(np.uint8)


def map_png(values: np.ndarray) -> bytes:
    """A map [H, W] as the official code draws it: from its smallest to its largest value, viridis, as a PNG."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, values, format="png")
    return file.getvalue()


def shaded(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image [H, W, 3] with the mask [H, W] in one colour and its contour, a pixel or more wide, inside of it.

    Pixels outside of the mask are those of the image.
    """
    import cv2

    width = max(1, round(min(mask.shape) / 240))
    kernel = np.ones([2 * width + 1] * 2, np.uint8)
    # The picture's own border is no contour.
    inner = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_REPLICATE).astype(bool)
    colour = np.asarray(MASK_COLOUR, np.float32)
    result = image.copy()
    result[mask] = (image[mask] * (1 - _MASK_OPACITY) + colour * _MASK_OPACITY + 0.5).astype(np.uint8)
    result[mask & ~inner] = MASK_COLOUR
    return result


def overlaid(image: np.ndarray, values: np.ndarray, cmap: str = "inferno", alpha: float = 0.6) -> np.ndarray:
    """A map in 0..1 [H, W] over the image [H, W, 3]; ``alpha``: the map's share, from 0 to 1."""
    return (image * (1 - alpha) + coloured(values, cmap) * alpha + 0.5).astype(np.uint8)


def smooth(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map [h, w] at [height, width] without the edges of patches, for pictures to look at, not to measure."""
    image = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
