"""The reference back end: Pillow, with the very functions of `passl.data.transforms`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from PIL import Image

from passl.data.backends.backend import Backend, ImageInput, OpenedImage, checked_pixels
from passl.data.image_io import ImageSource, to_rgb
from passl.data.jpeg import plain_jpeg
from passl.data.transforms import (
    Normalize,
    ToTensor,
    apply_color_jitter,
    gaussian_blur,
    grayscale,
    horizontal_flip,
    resized_crop,
    solarize,
)
from passl.data.views import ViewParameters


class PillowBackend(Backend):
    """See the module."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.to_tensor = ToTensor()
        self.normalize = Normalize(mean, std)

    def open(self, image: ImageInput) -> OpenedImage:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(checked_pixels(image))
        if isinstance(image, Image.Image):
            return _PillowImage(self, image.height, image.width, None, to_rgb(image))
        jpeg = plain_jpeg(image)
        if jpeg is not None:
            return _PillowImage(self, jpeg.height, jpeg.width, image, None)
        return self.open(image.rgb())


class _PillowImage(OpenedImage):
    def __init__(
        self,
        backend: PillowBackend,
        height: int,
        width: int,
        source: Optional[ImageSource],
        image: Optional[Image.Image],
    ) -> None:
        self.backend = backend
        self.height = height
        self.width = width
        self.source = source
        self.image = image

    def decode(self, reduction: float = 1.0) -> None:
        if self.source is not None:
            self.image = self.source.rgb()

    def render(self, view: ViewParameters, size: tuple[int, int], out: np.ndarray) -> None:
        out[...] = self.backend.normalize(self.backend.to_tensor(render_view(self.image, view, size)))


def render_view(image: Image.Image, view: ViewParameters, size: tuple[int, int]) -> Image.Image:
    """Apply `view` to an RGB image, in the official order; the result has `size` (height, width)."""
    image = resized_crop(image, view.box, size, "bicubic")
    if view.flip:
        image = horizontal_flip(image)
    image = apply_color_jitter(image, view.jitter)
    if view.gray:
        image = grayscale(image)
    if view.blur_radius is not None:
        image = gaussian_blur(image, view.blur_radius)
    if view.solarize:
        image = solarize(image)
    return image
