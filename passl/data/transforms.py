"""Image transforms on Pillow images with an explicit random generator.

The functions apply one operation with given parameters and reproduce torchvision's Pillow back end exactly.
The registered classes are called as `transform(image, rng)`; the random ones draw the parameters from `rng`
and call the functions, the others ignore it. Sizes are an int or `[height, width]`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from passl.data import arrays
from passl.data.arguments import Size, check_jitter_strengths, height_and_width, positive_range, probability
from passl.data.geometry import (  # noqa: F401 (they have always been found here)
    INTERPOLATIONS,
    Box,
    center_crop,
    checked_interpolation,
    crop,
    image_size,
    resize,
    resized_center,
    resized_crop,
)
from passl.data.image_io import AnyImage
from passl.data.photometric import is_kept
from passl.registry import TRANSFORMS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Generator = np.random.Generator


# --- operations with given parameters ---


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black: 0 is black, 1 the image itself."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image's mean grey: 0 is grey, 1 the image itself."""
    # Pillow's own enhancer finds the mean in a Python loop over the histogram.
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the grey image: 0 is grey, 1 the image itself."""
    return ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, factor: float) -> Image.Image:
    """Turn the hue by `factor` (-0.5..0.5) of the colour circle. Even 0 rounds: the way leads over HSV."""
    hsv = np.array(image.convert("HSV"))
    # int() truncates towards zero before wrapping, like the cast in the official code.
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)
    return Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")


def grayscale(image: Image.Image) -> Image.Image:
    """Grey with three equal channels."""
    return image.convert("L").convert("RGB")


def gaussian_blur(image: AnyImage, radius: float) -> AnyImage:
    """Blur with a standard deviation of `radius` pixels."""
    if isinstance(image, np.ndarray):
        return arrays.gaussian_blur(image, radius)
    return image.filter(ImageFilter.GaussianBlur(radius))


def solarize(image: Image.Image, threshold: int = 128) -> Image.Image:
    """Invert the values from `threshold` upwards."""
    return ImageOps.solarize(image, threshold)


def horizontal_flip(image: AnyImage) -> AnyImage:
    """Mirror left and right."""
    if isinstance(image, np.ndarray):
        return arrays.horizontal_flip(image)
    return ImageOps.mirror(image)


# --- drawing parameters ---


def uniform(rng: Generator, low: float, high: float) -> float:
    """What `rng.uniform(low, high)` returns, in a third of the time: dozens are drawn for each image."""
    return low + (high - low) * rng.random()


def draw_crop_box(
    rng: Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random box inside an image of `height` x `width`.

    Its share of the area is uniform in `scale` and the logarithm of width/height uniform in `ratio`; after
    ten boxes that do not fit, the largest central box with an allowed ratio is returned (torchvision's rule).
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target_area = height * width * uniform(rng, *scale)
        aspect = math.exp(uniform(rng, *log_ratio))
        box_width = round(math.sqrt(target_area * aspect))
        box_height = round(math.sqrt(target_area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_height, box_width = height, width
    if width < height * ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width > height * ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


JitterSteps = tuple[tuple[str, float], ...]
_JITTER_OPERATIONS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
_ARRAY_OPERATIONS = {"brightness": arrays.adjust_brightness, "contrast": arrays.adjust_contrast}


def draw_color_jitter(rng: Generator, brightness: float, contrast: float, saturation: float, hue: float) -> JitterSteps:
    """Factors of the four operations in random order, as `((operation, factor), ...)`.

    The first three factors are uniform in `max(0, 1 - strength) .. 1 + strength`, the hue's in `-hue .. hue`;
    an operation of strength 0 is left out.
    """
    ranges = _jitter_ranges(brightness, contrast, saturation, hue)
    steps = [(name, uniform(rng, low, high)) for name, low, high in ranges]
    return tuple([steps[i] for i in rng.permutation(len(steps)).tolist()])


@functools.lru_cache
def _jitter_ranges(
    brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[tuple[str, float, float], ...]:
    """(operation, lowest factor, highest factor), without those that change nothing."""
    blends = (("brightness", brightness), ("contrast", contrast), ("saturation", saturation))
    ranges = [(name, max(0.0, 1.0 - strength), 1.0 + strength) for name, strength in blends if strength > 0]
    return (*ranges, ("hue", -hue, hue)) if hue > 0 else tuple(ranges)


def apply_color_jitter(image: AnyImage, steps: JitterSteps) -> AnyImage:
    """Apply what `draw_color_jitter` drew, in its order; to an array what has a meaning for it."""
    for name, factor in steps:
        if not isinstance(image, np.ndarray):
            image = _JITTER_OPERATIONS[name](image, factor)
        elif is_kept(name, image.shape[2]):
            image = _ARRAY_OPERATIONS[name](image, factor)
    return image


# --- registered transforms ---


class Compose:
    """Apply `transforms` one after the other with one generator; it takes what the first of them takes.

    A `CenterCrop` right after a `Resize` is made in one step with it.
    """

    def __init__(self, transforms: Sequence[Callable[..., Any]]) -> None:
        self.transforms = list(transforms)
        self._steps: list[Callable[..., Any]] = []
        for transform in transforms:
            if self._steps and type(transform) is CenterCrop and type(self._steps[-1]) is Resize:
                self._steps[-1] = _ResizedCenter(self._steps[-1], transform)
            else:
                self._steps.append(transform)
        self.takes_source = bool(self.transforms) and getattr(self.transforms[0], "takes_source", False)

    def __call__(self, image: Any, rng: Optional[Generator] = None) -> Any:
        for step in self._steps:
            image = step(image, rng)
        return image


@TRANSFORMS.register()
class Resize:
    """Resize with antialiasing; an int is the shorter side's new length, `[height, width]` the exact size."""

    def __init__(self, size: Size, interpolation: str = "bilinear") -> None:
        height_and_width(size)
        self.size = size
        self.interpolation = checked_interpolation(interpolation)

    def __call__(self, image: AnyImage, rng: Optional[Generator] = None) -> AnyImage:
        return resize(image, self.size, self.interpolation)


@TRANSFORMS.register()
class CenterCrop:
    """Cut out the middle; smaller images are padded with black."""

    def __init__(self, size: Size) -> None:
        self.size = height_and_width(size)

    def __call__(self, image: AnyImage, rng: Optional[Generator] = None) -> AnyImage:
        return center_crop(image, self.size)


class _ResizedCenter:
    """Both, see `resized_center`."""

    def __init__(self, first: Resize, second: CenterCrop) -> None:
        self.first = first
        self.second = second

    def __call__(self, image: AnyImage, rng: Optional[Generator] = None) -> AnyImage:
        return resized_center(image, self.first.size, self.second.size, self.first.interpolation)


@TRANSFORMS.register()
class RandomResizedCrop:
    """A random box (share of the area in `scale`, width/height in `ratio`) resized to `size`."""

    def __init__(
        self,
        size: Size,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
    ) -> None:
        self.size = height_and_width(size)
        self.scale = positive_range(scale, "scale", highest=1.0)
        self.ratio = positive_range(ratio, "ratio")
        self.interpolation = checked_interpolation(interpolation)

    def __call__(self, image: AnyImage, rng: Generator) -> AnyImage:
        box = draw_crop_box(rng, *image_size(image), self.scale, self.ratio)
        return resized_crop(image, box, self.size, self.interpolation)


@TRANSFORMS.register()
class RandomHorizontalFlip:
    """Mirror left and right with probability `prob`."""

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = probability(prob, "prob")

    def __call__(self, image: AnyImage, rng: Generator) -> AnyImage:
        return horizontal_flip(image) if rng.random() < self.prob else image


@TRANSFORMS.register()
class ColorJitter:
    """With probability `prob`, change brightness, contrast, saturation and hue in random order.

    Of arrays, the brightness and contrast of one channel (see `passl.data.photometric`).
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        prob: float = 1.0,
    ) -> None:
        check_jitter_strengths(brightness, contrast, saturation, hue)
        self.strengths = (brightness, contrast, saturation, hue)
        self.prob = probability(prob, "prob")

    def __call__(self, image: AnyImage, rng: Generator) -> AnyImage:
        if rng.random() >= self.prob:
            return image
        return apply_color_jitter(image, draw_color_jitter(rng, *self.strengths))


@TRANSFORMS.register()
class RandomGrayscale:
    """Make the image grey, in three equal channels, with probability `prob`; arrays stay as they are."""

    def __init__(self, prob: float = 0.2) -> None:
        self.prob = probability(prob, "prob")

    def __call__(self, image: AnyImage, rng: Generator) -> AnyImage:
        return grayscale(image) if rng.random() < self.prob and not isinstance(image, np.ndarray) else image


@TRANSFORMS.register()
class GaussianBlur:
    """With probability `prob`, blur with a standard deviation drawn from `radius`, in pixels."""

    def __init__(self, prob: float = 0.5, radius: Sequence[float] = (0.1, 2.0)) -> None:
        self.prob = probability(prob, "prob")
        self.radius = positive_range(radius, "radius")

    def __call__(self, image: AnyImage, rng: Generator) -> AnyImage:
        return gaussian_blur(image, rng.uniform(*self.radius)) if rng.random() < self.prob else image


@TRANSFORMS.register()
class Solarize:
    """With probability `prob`, invert the values from `threshold` upwards; arrays have no white, and stay."""

    def __init__(self, prob: float = 0.2, threshold: int = 128) -> None:
        self.prob = probability(prob, "prob")
        self.threshold = threshold

    def __call__(self, image: AnyImage, rng: Generator) -> AnyImage:
        is_drawn = rng.random() < self.prob and not isinstance(image, np.ndarray)
        return solarize(image, self.threshold) if is_drawn else image


@TRANSFORMS.register()
class ToTensor:
    """RGB image -> float32 array `[3, H, W]` in 0..1. Array `[H, W, C]` -> `[C, H, W]`; floats keep their values."""

    def __call__(self, image: AnyImage, rng: Optional[Generator] = None) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return arrays.to_tensor(image)
        # order="C": the default keeps the channels-last memory layout, which makes everything after it slow.
        return np.divide(np.asarray(image).transpose(2, 0, 1), np.float32(255), dtype=np.float32, order="C")


@TRANSFORMS.register()
class Normalize:
    """`(array - mean) / std` per channel of a float32 array `[..., C, H, W]`; one value counts for all channels."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std need one value per channel and std above 0, not {mean!r} and {std!r}")
        self.mean = np.asarray(mean, np.float32)[:, None, None]
        self.std = np.asarray(std, np.float32)[:, None, None]

    def __call__(self, array: np.ndarray, rng: Optional[Generator] = None) -> np.ndarray:
        mean, std = self.statistics_of(array.shape[-3])
        return (array - mean) / std

    def statistics_of(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """`mean` and `std` [C or 1, 1, 1] of images of so many channels. Raises ValueError: there are others."""
        if len(self.mean) not in (1, channels):
            raise ValueError(
                f"mean and std have {len(self.mean)} values, and the image {channels} channels: give one for each of "
                "them, or the configuration a section Data"
            )
        return self.mean, self.std
