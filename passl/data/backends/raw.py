"""The back end for images that are not 8-bit RGB: any number of channels, of integers or floats.

Boxes, flips and blurs are those of the other back ends, computed in float32 with the same filters. Of the changes of
colour and light only those are done that have a meaning, see `passl.data.photometric`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from passl.data import arrays, photometric
from passl.data.backends.backend import Backend, ImageInput, OpenedImage
from passl.data.image_io import ImageSource
from passl.data.transforms import Normalize
from passl.data.views import ViewParameters

_CHANGES = {"brightness": arrays.adjust_brightness, "contrast": arrays.adjust_contrast}


def is_raw(image: ImageInput) -> bool:
    """Whether `image` is for this back end: not 8-bit RGB."""
    if isinstance(image, ImageSource):
        return image.is_raw
    return isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.shape[2:] != (3,))


class RawBackend(Backend):
    """See the module. `mean` and `std` are in the units of `passl.data.raw_images.unit_floats`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.normalize = Normalize(mean, std)

    def open(self, image: ImageInput) -> OpenedImage:
        array = np.asarray(image.image() if isinstance(image, ImageSource) else image)
        return _RawImage(array, self)


class _RawImage(OpenedImage):
    def __init__(self, array: np.ndarray, backend: RawBackend) -> None:
        self.array = array
        self.backend = backend
        self.height, self.width, self.channels = array.shape

    def decode(self, reduction: float = 1.0) -> None:
        # Once for all views, which overlap.
        self.planes = arrays.to_tensor(self.array)

    def render(self, view: ViewParameters, size: tuple[int, int], out: np.ndarray) -> None:
        box = view.box
        planes = self.planes[:, box.top : box.top + box.height, box.left : box.left + box.width]
        planes = arrays.resize_planes(planes, *size, Image.Resampling.BICUBIC)
        if view.flip:
            planes = planes[:, :, ::-1]
        for name, factor in view.jitter:
            if photometric.is_kept(name, self.channels):
                planes = _CHANGES[name](planes, factor)
        if view.blur_radius is not None:
            planes = arrays.blur_planes(planes, view.blur_radius)
        out[...] = self.backend.normalize(planes)
