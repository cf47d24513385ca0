"""What `MultiCrop` asks of a back end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Union

import numpy as np
from PIL import Image

from passl.data.image_io import ImageSource
from passl.data.views import ViewParameters

# Undecoded, as the data sets give it; or decoded: a Pillow image in mode RGB, or an array [H, W, C]. The back ends for
# pictures take no arrays but uint8 [H, W, 3].
ImageInput = Union[ImageSource, Image.Image, np.ndarray]


class OpenedImage(ABC):
    """One image, from its header to its views.

    Attributes:
        height, width: of the upright image at full size, in pixels. Known before `decode`: views are drawn for them.
        channels: of the views.
    """

    height: int
    width: int
    channels: int = 3

    @abstractmethod
    def decode(self, reduction: float = 1.0) -> None:
        """Decode the pixels, once; every `render` comes after it.

        Args:
            reduction: by how much each side of every view will be reduced at least (see `least_reduction`). A back
                end may decode at a smaller size where that does not show.

        Raises:
            UnreadableImageError: the file is damaged.
        """

    @abstractmethod
    def render(self, view: ViewParameters, size: tuple[int, int], out: np.ndarray) -> None:
        """Write `view` in `size` (height, width), finished and normalised, into `out`: float32 [C, height, width]."""


def checked_pixels(pixels: np.ndarray) -> np.ndarray:
    """`pixels`, if they are uint8 [H, W, 3]. Raises ValueError."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image given as an array must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels


class Backend(ABC):
    """Opens images. It is sent to worker processes, so it can be pickled."""

    @abstractmethod
    def open(self, image: ImageInput) -> OpenedImage:
        """Read as much of `image` as tells its size. Raises UnreadableImageError."""


def least_reduction(views: Iterable[tuple[ViewParameters, tuple[int, int]]]) -> float:
    """The smallest (pixels of the box) / (pixels of the view) of both sides of all `views`, given with their sizes."""
    return min(min(view.box.height / height, view.box.width / width) for view, (height, width) in views)
