"""Antialiased bicubic resizing of uint8 arrays, as Pillow does it: which OpenCV cannot."""

from __future__ import annotations

import logging
import math

import cv2
import numpy as np
from PIL import Image

try:
    import cykooz_resizer
    from cykooz_resizer import ResizeOptions
except ImportError:  # It has no release for Python 3.9.
    cykooz_resizer = None
else:
    _RGBX = cykooz_resizer.PixelType.U8x4
    _CATMULL_ROM = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom)
    _WHOLE = ResizeOptions(resize_alg=_CATMULL_ROM, use_alpha=False)

logger = logging.getLogger("passl")

# First row and column, height and width; floats, because a box of a reduced image may begin between two pixels.
FloatBox = tuple[float, float, float, float]


SLOW = (
    "the package cykooz-resizer is not installed: Pillow resizes the views, which takes five times as long "
    "(pip install cykooz-resizer; it needs Python 3.10 or later)"
)
_warned: list[str] = []


def warn_if_slow() -> None:
    """Say so, once, if the fast library is missing."""
    if cykooz_resizer is None and SLOW not in _warned:
        _warned.append(SLOW)
        logger.warning(SLOW)


def resize(pixels: np.ndarray, box: FloatBox, size: tuple[int, int]) -> np.ndarray:
    """The part `box` of `pixels`, resized; no pixel that lies outside of the box entirely has a part in it.

    Args:
        pixels: uint8 [H, W, 4], RGB and a channel without meaning, because the library takes 1.4 times as long for
            pixels of three bytes; or [H, W, 3].
        size: (height, width) of the result.

    Returns:
        uint8 [height, width, 3], within two levels of what Pillow 13 makes of the cropped image.
    """
    top, left, height, width = box
    row, column = int(top), int(left)
    pixels = pixels[row : math.ceil(top + height), column : math.ceil(left + width)]
    if pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
    inner = (top - row, left - column, height, width)
    return _with_pillow(pixels, inner, size) if cykooz_resizer is None else _with_cykooz(pixels, inner, size)


def _with_pillow(pixels: np.ndarray, box: FloatBox, size: tuple[int, int]) -> np.ndarray:
    top, left, height, width = box
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    corners = (left, top, left + width, top + height)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=corners))


def _with_cykooz(pixels: np.ndarray, box: FloatBox, size: tuple[int, int]) -> np.ndarray:
    top, left, height, width = box
    rows, columns = pixels.shape[:2]
    image = cykooz_resizer.ImageData(columns, rows, _RGBX, pixels.tobytes())
    resizer = cykooz_resizer.Resizer()
    result = cykooz_resizer.ImageData(size[1], size[0], _RGBX)
    if size[0] < height and height - size[0] > 2 * (width - size[1]):
        # Down and across at once, in this order.
        resizer.resize(image, result, _options(columns, rows, left, top, width, height))
    else:
        # Values below 0 and above 255 are cut off between the two, so the order shows: this is Pillow's.
        wide = cykooz_resizer.ImageData(size[1], rows, _RGBX)
        resizer.resize(image, wide, _options(columns, rows, left, 0, width, rows))
        resizer.resize(wide, result, _options(size[1], rows, 0, top, size[1], height))
    return cv2.cvtColor(np.frombuffer(result.get_buffer(), np.uint8).reshape(*size, 4), cv2.COLOR_RGBA2RGB)


def _options(columns: int, rows: int, left: float, top: float, width: float, height: float) -> ResizeOptions:
    if (width, height) == (columns, rows):
        return _WHOLE
    options = _WHOLE.copy()
    options.crop_box = cykooz_resizer.CropBox(left, top, width, height)
    return options
