"""The reference back end: Pillow, with the very functions of `passl.data.transforms`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from passl.data.backends.backend import Backend, ImageInput, OpenedImage
from passl.data.image_io import ImageSource
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
        if isinstance(image, ImageSource):
            image = image.rgb()
        return _PillowImage(image if isinstance(image, Image.Image) else Image.fromarray(image), self)


class _PillowImage(OpenedImage):
    def __init__(self, image: Image.Image, backend: PillowBackend) -> None:
        self.image = image
        self.backend = backend
        self.width, self.height = image.size

    def decode(self, reduction: float = 1.0) -> None:
        pass

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
