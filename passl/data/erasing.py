"""Random erasing (Zhong et al. 2020): a box of the image is overwritten, so that no single part decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Optional

import numpy as np

from passl.data.arguments import positive_range, probability
from passl.data.geometry import Box
from passl.registry import TRANSFORMS

_TRIES = 10


@TRANSFORMS.register()
class RandomErasing:
    """With probability `prob`, overwrites a random box of an array `[C, H, W]`; it belongs after Normalize.

    Args:
        scale: share of the area; below the whole.
        ratio: height/width of the box, drawn evenly in its logarithm.
        mode: "const" fills with `value`, "rand" with one normal number per channel, "pixel" with one per pixel and
            channel: N(0, 1), as normalised images are distributed.
        value: of "const"; 0 is the mean colour of normalised images.

    An image for which ten boxes in a row do not fit stays as it is.
    """

    def __init__(
        self,
        prob: float = 0.25,
        scale: Sequence[float] = (0.02, 1 / 3),
        ratio: Sequence[float] = (0.3, 10 / 3),
        mode: Literal["const", "rand", "pixel"] = "pixel",
        value: float = 0.0,
    ) -> None:
        if mode not in ("const", "rand", "pixel"):
            raise ValueError(f"mode ({mode!r}) must be 'const', 'rand' or 'pixel'")
        self.prob = probability(prob, "prob")
        self.scale = positive_range(scale, "scale", highest=1.0)
        self.ratio = positive_range(ratio, "ratio")
        self.mode = mode
        self.value = value

    def __call__(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f":
            raise ValueError("RandomErasing needs a float array [C, H, W]: put it after ToTensor and Normalize")
        if rng.random() >= self.prob:
            return array
        box = self._draw_box(rng, *array.shape[1:])
        if box is None:
            return array
        erased = array.copy()
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        erased[:, rows, columns] = self._filling(rng, len(array), box)
        return erased

    def _draw_box(self, rng: np.random.Generator, height: int, width: int) -> Optional[Box]:
        for _ in range(_TRIES):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_height < height and 0 < box_width < width:
                top = int(rng.integers(height - box_height + 1))
                left = int(rng.integers(width - box_width + 1))
                return Box(top, left, box_height, box_width)
        return None

    def _filling(self, rng: np.random.Generator, channels: int, box: Box) -> np.ndarray:
        """Broadcasts to [C, height, width] of the box."""
        if self.mode == "const":
            return np.float32(self.value)
        shape = (channels, 1, 1) if self.mode == "rand" else (channels, box.height, box.width)
        return rng.standard_normal(shape, np.float32)
