"""JPEG files on a fast lane: the size from the header, the pixels straight into an array, smaller if that will do.

Only plain ones, 8 bits grey or colour (YCbCr or RGB); all others and all doubtful ones take Pillow's way. What comes
out is the same, and so are the errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import numpy as np

from passl.data.image_io import ImageSource, exif_orientation

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# What turns a stored image [H, W, C] upright, by EXIF orientation: whether to swap the axes, and then where to begin.
_TURNS = {
    1: (False, 1, 1),
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


@dataclass(frozen=True)
class PlainJpeg:
    """A JPEG that the fast lane can decode. `height`, `width`: of the upright image, in pixels."""

    source: ImageSource
    height: int
    width: int
    orientation: int

    def reductions(self) -> Iterator[int]:
        """Those of 8, 4 and 2 with which the pixels lie as if the upright image were divided from its corner on."""
        for reduction in (8, 4, 2):  # those that JPEG's blocks of 8 x 8 allow
            # A turned image may begin with what was the last column, which is whole only if the width divides.
            if self.orientation == 1 or self.height % reduction == self.width % reduction == 0:
                yield reduction

    def decode(self, reduction: int = 1) -> np.ndarray:
        """uint8 [H, W, 4], upright, the sides divided by `reduction` (1, 2, 4 or 8) and rounded up.

        The fourth channel means nothing: pixels of four bytes are faster to work with.

        Raises:
            UnreadableImageError: the pixels are damaged.
        """
        pixels = self._stored(reduction)
        swap, down, across = _TURNS[self.orientation]
        if self.orientation == 1:
            return pixels
        pixels = pixels.transpose(1, 0, 2) if swap else pixels
        return np.ascontiguousarray(pixels[::down, ::across])

    def _stored(self, reduction: int) -> np.ndarray:
        if simplejpeg is None:
            return self._stored_by_pillow(reduction)
        swap = _TURNS[self.orientation][0]
        height, width = (self.width, self.height) if swap else (self.height, self.width)
        try:
            return simplejpeg.decode_jpeg(
                self.source.data, "RGBX", min_height=-(-height // reduction), min_width=-(-width // reduction)
            )
        except ValueError:  # Strict: also at what is harmless. Pillow decides, and words the error.
            return self._stored_by_pillow(reduction)

    def _stored_by_pillow(self, reduction: int) -> np.ndarray:
        with self.source.opened() as image:
            if reduction > 1:
                image.draft("RGB", (image.width // reduction, image.height // reduction))
            return np.asarray(image.convert("RGB").convert("RGBX"))


def plain_jpeg(source: ImageSource) -> Optional[PlainJpeg]:
    """`source` as a JPEG for the fast lane, or None. Raises UnreadableImageError: it cannot even be identified."""
    with source.opened() as image:
        if image.format != "JPEG" or image.mode not in ("L", "RGB"):
            return None
        orientation = exif_orientation(image)
        width, height = image.size[::-1] if _TURNS[orientation][0] else image.size
    return PlainJpeg(source, height, width, orientation)
