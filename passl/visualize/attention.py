"""Pictures of what a network attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from PIL import Image

from passl.visualize.attention_maps import coloured, shaded, smooth, stretched, upsampled
from passl.visualize.overview import Tile, sheet

_MARK = (255, 255, 255)


def overview(
    image: np.ndarray,
    maps: np.ndarray,
    masks: Optional[np.ndarray] = None,
    labels: Optional[Sequence[str]] = None,
    cmap: str = "inferno",
) -> Image.Image:
    """The image, the mean of the maps over it, each map, and below each map its mask.

    Args:
        image: uint8 [H, W, 3]
        maps: [heads, h, w], each drawn from its smallest value to one that only its brightest patches pass.
        masks: bool [heads, h, w]
        labels: of the maps; "head 0", "head 1" ... by default.

    Raises:
        ValueError: the shapes do not fit.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image ({image.dtype} {list(image.shape)}) must be uint8 [H, W, 3]")
    if maps.ndim != 3 or not len(maps) or (masks is not None and masks.shape != maps.shape):
        mask_text = "" if masks is None else f", masks {list(masks.shape)}"
        raise ValueError(f"maps {list(maps.shape)}{mask_text}: expected [heads, h, w], of one head at least")
    maps = np.asarray(maps, np.float32)
    names = [f"head {head}" for head in range(len(maps))] if labels is None else list(labels)
    mean_name = f"mean of {len(maps)} heads" if len(maps) > 1 else f"{names[0]}, over the image"
    leading = [Tile("image", image), Tile(mean_name, glowing(image, maps.mean(0), cmap))]
    bands = [[Tile(name, _drawn(image, one, cmap, *_range(one)), crisp=True) for name, one in zip(names, maps)]]
    if masks is not None:
        pixels = upsampled(masks, *image.shape[:2])
        bands.append([Tile(f"{name}, mask", shaded(image, mask)) for name, mask in zip(names, pixels)])
    return sheet(leading, bands)


def similarity_overview(image: np.ndarray, similarity: np.ndarray, patch: tuple[int, int], cmap: str) -> Image.Image:
    """The image with the chosen patch framed, the similarity over it, and the similarity alone.

    image: uint8 [H, W, 3]; similarity: [h, w]; patch: (row, column)
    """
    framed = _framed(image, patch, similarity.shape)
    glow = _framed(glowing(image, similarity, cmap), patch, similarity.shape)
    alone = _framed(_drawn(image, similarity, cmap, similarity.min(), similarity.max()), patch, similarity.shape)
    label = f"similarity, {similarity.min():.2f} to {similarity.max():.2f}"
    return sheet([Tile("image and patch", framed), Tile("similar patches", glow), Tile(label, alone)], [])


def glowing(image: np.ndarray, values: np.ndarray, cmap: str = "inferno") -> np.ndarray:
    """A map [h, w] as light over the darkened image [H, W, 3]: the more, the more of the colour and the less dark."""
    height, width = image.shape[:2]
    level = smooth(stretched(values, *_range(values)), height, width)
    level = np.clip(level, 0.0, 1.0)
    share = (0.15 + 0.4 * level)[:, :, None]
    dimmed = image * (0.35 + 0.65 * level)[:, :, None]
    return (dimmed * (1 - share) + coloured(level, cmap) * share + 0.5).astype(np.uint8)


def _range(values: np.ndarray) -> tuple[float, float]:
    # A few bright patches would leave all others black.
    brightest = min(max(4 / values.size, 0.005), 0.5)
    return float(values.min()), float(np.quantile(values, 1 - brightest))


def _drawn(image: np.ndarray, values: np.ndarray, cmap: str, low: float, high: float) -> np.ndarray:
    return coloured(upsampled(stretched(values, low, high), *image.shape[:2]), cmap)


def _framed(image: np.ndarray, patch: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The image with a white frame, edged in black, around a patch."""
    height, width = image.shape[:2]
    top, bottom = (index * height // grid[0] for index in (patch[0], patch[0] + 1))
    left, right = (index * width // grid[1] for index in (patch[1], patch[1] + 1))
    result = image.copy()
    line = max(1, min(height, width) // 200)
    for reach, colour in ((2 * line, (0, 0, 0)), (line, _MARK)):
        result[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach] = colour
    result[top:bottom, left:right] = image[top:bottom, left:right]
    return result
