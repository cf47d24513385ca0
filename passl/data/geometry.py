"""Sizes, boxes and resizing of Pillow images and of arrays [H, W, C]."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from passl.data import arrays
from passl.data.arguments import Size, height_and_width
from passl.data.image_io import AnyImage

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


class Box(NamedTuple):
    """A rectangle of pixels: its first row and column, its height and width."""

    top: int
    left: int
    height: int
    width: int


def checked_interpolation(interpolation: str) -> str:
    """`interpolation`, if there is one of this name. Raises ValueError."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}")
    return interpolation


def image_size(image: AnyImage) -> tuple[int, int]:
    """(height, width) in pixels"""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def resize(image: AnyImage, size: Size, interpolation: str = "bilinear") -> AnyImage:
    """Resize with antialiasing. An int is the shorter side's new length, `[height, width]` the exact size."""
    return _resized(image, *_new_size(image, size), interpolation)


def _new_size(image: AnyImage, size: Size) -> tuple[int, int]:
    if not isinstance(size, int):
        return height_and_width(size)
    height, width = image_size(image)
    # torchvision truncates the longer side.
    return (int(size * height / width), size) if width <= height else (size, int(size * width / height))


def _resized(
    image: AnyImage,
    height: int,
    width: int,
    interpolation: str,
    part: Optional[tuple[float, float, float, float]] = None,
) -> AnyImage:
    """`part`: what to resize; left, top, right and bottom, between pixels too, whose neighbours count."""
    resampling = INTERPOLATIONS[checked_interpolation(interpolation)]
    if isinstance(image, np.ndarray):
        return arrays.resize(image, height, width, resampling, part)
    return image.resize((width, height), resampling, part)


def crop(image: AnyImage, box: Box) -> AnyImage:
    """The pixels in `box`; what lies outside of the image is black."""
    if isinstance(image, np.ndarray):
        return arrays.crop(image, box)
    return image.crop((box.left, box.top, box.left + box.width, box.top + box.height))


def center_crop(image: AnyImage, size: Size) -> AnyImage:
    """The middle of the image; a smaller image is padded with black, a little more at right and bottom."""
    height, width = height_and_width(size)
    image_height, image_width = image_size(image)
    top = _center_offset(image_height, height)
    left = _center_offset(image_width, width)
    return crop(image, Box(top, left, height, width))


def _center_offset(length: int, wanted: int) -> int:
    # round() to even inside, floor outside: both as torchvision.
    return round((length - wanted) / 2) if length >= wanted else -((wanted - length) // 2)


def resized_crop(image: AnyImage, box: Box, size: Size, interpolation: str = "bilinear") -> AnyImage:
    """Cut `box` out and resize it to exactly `size`.

    In two steps, because `Image.resize(box=...)` lets the pixels around the box into the result.
    """
    height, width = height_and_width(size)
    return _resized(crop(image, box), height, width, interpolation)


# How many times the crop's length a side may be resized to, of which only the crop is wanted.
_MUCH = 16
_WITH_STEPS = ("nearest", "box")  # rounding may make them take the next pixel


def resized_center(image: AnyImage, size: Size, crop_size: Size, interpolation: str = "bilinear") -> AnyImage:
    """`center_crop(resize(image, size), crop_size)`, to within rounding, without the picture in between where that is
    much larger than the image and its middle: 1 x 5000 pixels would become 256 x 1,280,000."""
    old, new, wanted = image_size(image), _new_size(image, size), height_and_width(crop_size)
    is_much = any(to > max(length, _MUCH * crop_length) for length, to, crop_length in zip(old, new, wanted))
    if not isinstance(size, int) or not is_much or interpolation in _WITH_STEPS:
        return center_crop(resize(image, size, interpolation), crop_size)
    (top, height, rows, up, down), (left, width, columns, start, end) = map(_middle, old, new, wanted)
    part = crop(image, Box(top, left, height, width))
    # Values beyond black and white are cut off in between, so the order shows: an enlarging `resize` begins across.
    part = _resized(part, height, columns, interpolation, (start, 0, end, height))
    part = _resized(part, rows, columns, interpolation, (0, up, columns, down))
    return center_crop(part, crop_size)


def _middle(length: int, new: int, wanted: int) -> tuple[int, int, int, float, float]:
    """Of a side of `length` pixels, resized to `new`, what `wanted` pixels in the middle are made of.

    Returns:
        First pixel and number of pixels of a part of the side, and what becomes of it: the number of new pixels, and
        where, counted from the part's beginning, their sources begin and end.
    """
    if new <= _MUCH * wanted:
        return 0, length, new, 0.0, float(length)
    scale, offset = length / new, _center_offset(new, wanted)
    start, end = offset * scale, (offset + wanted) * scale
    reach = 3 * max(scale, 1.0) + 1  # of the widest filter, Lanczos
    first, last = max(0, math.floor(start - reach)), min(length, math.ceil(end + reach))
    return first, last - first, wanted, start - first, end - first
