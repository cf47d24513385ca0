"""An image on its way into a network that looks at patches, and back into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np

from passl.data.geometry import Box, crop, image_size, resize
from passl.data.image_io import AnyImage
from passl.data.transforms import Normalize, ToTensor

_MAX_PIXELS = 2**26  # of a resized image: one of 1 x 5000 pixels would become 480 x 2,400,000


@dataclass
class Prepared:
    """An image for a network.

    Attributes:
        tensor: float32 [C, H, W], normalised; cut at the right and bottom to whole patches.
        resized: (height, width) before that cut.
        original: (height, width) of the image as it was read, upright.
    """

    tensor: np.ndarray
    resized: tuple[int, int]
    original: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the tensor"""
        return self.tensor.shape[1:]

    def to_original(self, x: float, y: float) -> tuple[float, float]:
        """A place in the tensor's pixels, in pixels of the original image."""
        return x * self.original[1] / self.resized[1], y * self.original[0] / self.resized[0]

    def patch_at(self, x: float, y: float, grid: tuple[int, int]) -> tuple[int, int]:
        """(row, column) of the patch at a place in pixels of the original image. In the cut strip it is the next one.

        Raises:
            ValueError: the place is outside of the image.
        """
        height, width = self.original
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"point ({x:g},{y:g}) is outside of the image, which is {width} wide and {height} high")
        row = int(y * self.resized[0] / height * grid[0] / self.size[0])
        column = int(x * self.resized[1] / width * grid[1] / self.size[1])
        return min(row, grid[0] - 1), min(column, grid[1] - 1)


def resized(image: AnyImage, size: Union[int, Sequence[int]]) -> AnyImage:
    """The image, resized (bilinear, with antialiasing, as the official code).

    size: of the shorter side, or [height, width].

    Raises:
        ValueError: that is larger than any network or video can take.
    """
    height, width = image_size(image)
    if isinstance(size, int):
        pixels, advice = size * size * max(height, width) / min(height, width), "a smaller size, or HEIGHT WIDTH"
    else:
        pixels, advice = size[0] * size[1], "a smaller size"
    if pixels > _MAX_PIXELS:
        wanted = size if isinstance(size, int) else " x ".join(map(str, size))
        raise ValueError(f"{height} x {width} pixels, resized to {wanted}, would be {pixels:.3g} pixels: give {advice}")
    return resize(image, size)


def prepare(
    image: AnyImage,
    size: Optional[Union[int, Sequence[int]]],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Prepared:
    """The image, resized, normalised, and cut to whole patches.

    size: of the shorter side, or [height, width], or None for as it is.

    Raises:
        ValueError: not one patch is left, or far too many.
    """
    original = image_size(image)
    if size is not None:
        image = resized(image, size)
    full = image_size(image)
    height, width = (side - side % patch_size for side in full)
    if not (height and width):
        raise ValueError(f"an image of {full[0]} x {full[1]} has no whole patch of {patch_size} pixels")
    array = ToTensor()(crop(image, Box(0, 0, height, width)))
    return Prepared(Normalize(mean, std)(array), full, original)


def denormalized(tensor: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """An image as it went into a network, in its own colours: [C, H, W] -> 8-bit RGB [H, W, 3].

    Of one or two channels the first is shown in grey, of more than three the first three; other values than those of
    8-bit images are stretched from the darkest to the brightest.

    mean, std: of Normalize; [C, 1, 1], or one number for all channels.
    """
    values = tensor * std + mean
    if len(values) != 3:
        values = values[:3] if len(values) > 3 else np.repeat(values[:1], 3, axis=0)
    low, high = (0.0, 1.0) if values.min() > -0.5 and values.max() < 1.5 else (values.min(), values.max())
    levels = (values - low) / max(high - low, 1e-12)
    return (np.clip(levels, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def picture_of(tensor: np.ndarray) -> np.ndarray:
    """What the network sees, as 8-bit RGB [H, W, 3]: from the darkest to the brightest value of all channels.

    tensor: [C, H, W], normalised. Of one or two channels the first is shown in grey, of more the first three.
    """
    channels = tensor[:3] if len(tensor) >= 3 else np.repeat(tensor[:1], 3, axis=0)
    low, high = channels.min(), channels.max()
    levels = (channels - low) / max(high - low, np.float32(1e-5))
    return np.clip(levels * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)
