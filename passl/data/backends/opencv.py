"""The fast back end: JPEGs decoded by simplejpeg, resized by cykooz-resizer, all else by OpenCV, one thread each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Optional

import cv2
import numpy as np
from PIL import Image

from passl.data.backends import pixels as ops
from passl.data.backends import resampling
from passl.data.backends.backend import Backend, ImageInput, OpenedImage, checked_pixels
from passl.data.image_io import ImageSource, to_rgb
from passl.data.jpeg import PlainJpeg, plain_jpeg
from passl.data.transforms import JitterSteps, Normalize, ToTensor
from passl.data.views import ViewParameters

# A reduced image is reduced by this much again, at least: the views then differ by half a level on average, and their
# gradient energy by 3 %. With 2 it would be a whole level and 6 %.
_LEFT_TO_RESIZE = 3.0
_OPERATIONS = {
    "brightness": ops.adjust_brightness,
    "contrast": ops.adjust_contrast,
    "saturation": ops.adjust_saturation,
    "hue": ops.adjust_hue,
}


class OpenCVBackend(Backend):
    """See the module. Within two levels of 255 of the Pillow back end for each operation, most often none."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        resampling.warn_if_slow()
        values = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 1, len(mean)))
        normalized = Normalize(mean, std)(ToTensor()(values))[..., 0]
        self.normalized = np.ascontiguousarray(normalized)  # [C, 256]: what becomes of each value
        self.normalized_solarized = np.ascontiguousarray(normalized[:, ops.solarized()])
        _use_one_thread()
        _keep_freed_memory()

    def open(self, image: ImageInput) -> OpenedImage:
        _use_one_thread()
        if isinstance(image, ImageSource):
            jpeg = plain_jpeg(image)
            if jpeg is not None:
                return _ArrayImage(self, jpeg.height, jpeg.width, None, jpeg)
            image = image.rgb()
        pixels = checked_pixels(np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image))
        return _ArrayImage(self, pixels.shape[0], pixels.shape[1], pixels, None)


def _use_one_thread() -> None:
    # Worker processes do the parallel work. Before they are started, too: a fork copies no threads, and a worker that
    # waited for OpenCV's would wait for ever.
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


@functools.cache
def _keep_freed_memory() -> None:
    # The C library gives freed arrays of a few megabytes back to the system at once, and getting them again for every
    # image costs a tenth of the time. It learns from the largest that it has seen freed, up to 32 MB: this is one.
    np.empty(31 * 2**20, np.uint8)


class _ArrayImage(OpenedImage):
    def __init__(
        self,
        backend: OpenCVBackend,
        height: int,
        width: int,
        pixels: Optional[np.ndarray],
        jpeg: Optional[PlainJpeg],
    ) -> None:
        self.backend = backend
        self.height = height
        self.width = width
        self.pixels = pixels
        self.jpeg = jpeg
        self.scale = 1

    def decode(self, reduction: float = 1.0) -> None:
        if self.jpeg is not None:
            self.scale = next((scale for scale in self.jpeg.reductions() if scale * _LEFT_TO_RESIZE <= reduction), 1)
            self.pixels = self.jpeg.decode(self.scale)
        elif self.pixels.shape[2] == 3:
            self.pixels = cv2.cvtColor(self.pixels, cv2.COLOR_RGB2RGBA)

    def render(self, view: ViewParameters, size: tuple[int, int], out: np.ndarray) -> None:
        box = view.box if self.scale == 1 else tuple(x / self.scale for x in view.box)
        image = resampling.resize(self.pixels, box, size)
        if view.flip:
            image = ops.horizontal_flip(image)
        image = apply_color_jitter(image, view.jitter)
        if view.gray:
            image = ops.to_gray(image)
        if view.blur_radius is not None:
            image = ops.gaussian_blur(image, view.blur_radius)
        # Solarising, dividing by 255 and normalising are one look-up.
        tables = self.backend.normalized_solarized if view.solarize else self.backend.normalized
        channels = (image,) * len(out) if image.ndim == 2 else cv2.split(image)
        for channel, table, plane in zip(channels, tables, out):
            cv2.LUT(channel, table, dst=plane)


def apply_color_jitter(image: np.ndarray, steps: JitterSteps) -> np.ndarray:
    """Apply what `draw_color_jitter` drew, in its order."""
    for name, factor in steps:
        image = _OPERATIONS[name](image, factor)
    return image
