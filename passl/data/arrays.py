"""The transforms' operations on arrays [H, W, C] of any number of channels and of any type of values.

Geometry is that of the images: the same boxes, the same antialiased filters. What computes with values returns float32
in the units of `unit_floats`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Optional

import numpy as np
from PIL import Image

from passl.data.raw_images import unit_floats

if TYPE_CHECKING:
    from passl.data.geometry import Box


Part = Optional[tuple[float, float, float, float]]


def resize(array: np.ndarray, height: int, width: int, resampling: Image.Resampling, part: Part = None) -> np.ndarray:
    """Resize with antialiasing to float32 [height, width, C]; `part`: as the `box` of Pillow's `resize`."""
    if part is None and array.shape[:2] == (height, width):
        return unit_floats(array)
    return np.moveaxis(resize_planes(to_tensor(array), height, width, resampling, part), 0, -1)


def resize_planes(
    planes: np.ndarray, height: int, width: int, resampling: Image.Resampling, part: Part = None
) -> np.ndarray:
    """The same of float32 [C, H, W]."""
    if part is None and planes.shape[1:] == (height, width):
        return planes
    result = np.empty((len(planes), height, width), np.float32)
    # Pillow's filters know one float channel at a time; OpenCV has no antialiased bicubic one.
    for plane, resized in zip(planes, result):
        resized[...] = Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), resampling, part)
    return result


def crop(array: np.ndarray, box: Box) -> np.ndarray:
    """The values in `box`; what lies outside of the image is 0."""
    bottom, right = box.top + box.height, box.left + box.width
    inside = array[max(box.top, 0) : max(bottom, 0), max(box.left, 0) : max(right, 0)]
    if inside.shape[:2] == (box.height, box.width):
        return inside
    result = np.zeros((box.height, box.width, array.shape[2]), array.dtype)
    rows, columns = inside.shape[:2]
    top, left = max(-box.top, 0), max(-box.left, 0)
    result[top : top + rows, left : left + columns] = inside
    return result


def horizontal_flip(array: np.ndarray) -> np.ndarray:
    """Mirror left and right."""
    return array[:, ::-1]


def gaussian_blur(array: np.ndarray, radius: float) -> np.ndarray:
    """Blur with a standard deviation of `radius` pixels to float32 [H, W, C]."""
    return np.moveaxis(blur_planes(to_tensor(array), radius), 0, -1)


def blur_planes(planes: np.ndarray, radius: float) -> np.ndarray:
    """The same of float32 [C, H, W]."""
    import cv2

    # As in the back end of OpenCV: workers do the parallel work, and threads do not survive a fork.
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
    # Four deviations to both sides: what is cut off weighs 6e-5.
    side = 2 * math.ceil(4 * radius) + 1
    result = np.empty(planes.shape, np.float32)
    for plane, blurred in zip(planes, result):
        cv2.GaussianBlur(np.ascontiguousarray(plane), (side, side), radius, blurred, borderType=cv2.BORDER_REPLICATE)
    return result


def adjust_brightness(array: np.ndarray, factor: float) -> np.ndarray:
    """Multiply: 0 is black, 1 the image itself. Nothing is clipped: only 8-bit pictures end at white."""
    return unit_floats(array) * np.float32(factor)


def adjust_contrast(array: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean: 0 is its mean, 1 the image itself."""
    values = unit_floats(array)
    mean = values.mean(dtype=np.float64)
    return values * np.float32(factor) + np.float32((1 - factor) * mean)


def to_tensor(array: np.ndarray) -> np.ndarray:
    """[H, W, C] -> float32 [C, H, W] in the units of `unit_floats`"""
    return np.ascontiguousarray(unit_floats(array).transpose(2, 0, 1))
