"""The operations of `passl.data.transforms` on uint8 arrays, with OpenCV.

Images are [H, W, 3], RGB; or [H, W], grey, where all three channels are equal. The results are Pillow's to within one
or two levels of 255, most of them exactly: Pillow cuts fractions off, where OpenCV rounds, and these functions make up
for it. None changes its argument.
"""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
from PIL import Image

# Rounding (x - 0.499) to the nearest integer cuts the fraction off. Half a level less, but not quite: whole numbers
# that come out a little too small must not lose a level.
_CUT = -0.499


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: 0 is black, 1 the image itself."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_CUT)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean grey: 0 is grey, 1 the image itself."""
    means = cv2.mean(image)
    mean = means[0] if image.ndim == 2 else 0.299 * means[0] + 0.587 * means[1] + 0.114 * means[2]
    mean = math.floor(mean + 0.5)
    return cv2.addWeighted(image, factor, image, 0.0, (1.0 - factor) * mean + _CUT)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image: 0 is grey, 1 the image itself."""
    if image.ndim == 2:
        return image
    gray = cv2.cvtColor(to_gray(image), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1.0 - factor, _CUT)


def to_gray(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W]; a grey image is returned as it is."""
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def solarize(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Invert the values from `threshold` upwards."""
    return cv2.LUT(image, solarized(threshold))


def solarized(threshold: int = 128) -> np.ndarray:
    """What becomes of each value when it is solarised: uint8 [256]."""
    values = np.arange(256, dtype=np.uint8)
    return np.where(values < threshold, values, 255 - values)


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    """Mirror left and right."""
    return cv2.flip(image, 1)


# --- hue ---


def adjust_hue(image: np.ndarray, factor: float) -> np.ndarray:
    """Turn the hue by `factor` (-0.5..0.5) of the colour circle; grey images have none.

    Pillow keeps hue H and saturation S in 8 bits each, fractions cut off, and so does this. With V, the largest of R, G
    and B, a channel of the result is V - V * S * absence(H), where `absence` depends on the hue and the channel alone.
    """
    if image.ndim == 2:
        return image
    hue, chroma, value = _hue_chroma_value(image)
    saturation = cv2.convertScaleAbs(cv2.divide(chroma, value, scale=255, dtype=cv2.CV_32F), beta=_CUT)
    chroma = cv2.multiply(value, saturation, scale=1 / 255)
    # int() truncates towards zero before wrapping, like the cast in the official code.
    turn = int(factor * 255) % 256
    absence = cv2.applyColorMap(hue, _ABSENCE[turn : turn + 256])
    missing = cv2.multiply(cv2.cvtColor(chroma, cv2.COLOR_GRAY2RGB), absence, scale=1 / 255)
    return cv2.subtract(cv2.cvtColor(value, cv2.COLOR_GRAY2RGB), missing)


def _hue_chroma_value(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pillow's H; (largest - smallest) and the largest of the three channels. All uint8 [H, W].

    The hue is looked up, not computed: OpenCV's own conversion is one of the 256 hues off where the rounding of floats
    decides, and that can be 6 levels in the result.
    """
    red, green, blue = cv2.split(image)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    # As 16-bit numbers, the column and the row in the table: low byte first.
    green_below, blue_below = (green < red).view(np.uint8), (blue < red).view(np.uint8)
    places = cv2.merge([green - red, green_below, blue - red, blue_below]).view(np.int16)
    return cv2.remap(_hues(), places, None, cv2.INTER_NEAREST), chroma, value


@functools.cache
def _hues() -> np.ndarray:
    """Pillow's H of all colours: it depends on the differences of the channels only.

    uint8 [512, 512]: the row is blue - red, the column green - red; negative ones, plus 512, are the second half.
    """
    differences = np.concatenate([np.arange(256), np.arange(-256, 0)])
    blue, green = np.meshgrid(differences, differences, indexing="ij")
    smallest = np.minimum(np.minimum(blue, green), 0)
    colours = np.stack([-smallest, green - smallest, blue - smallest], axis=-1)
    # Impossible ones, with differences above 255, are in the table only to fill it.
    return np.array(Image.fromarray(np.minimum(colours, 255).astype(np.uint8)).convert("HSV"))[..., 0].copy()


def _absence() -> np.ndarray:
    """By how much of the chroma R, G and B stay below the largest, for each hue: uint8 [512, 1, 3], 255 is all.

    Twice the circle, so that a turned one is a part of it.
    """
    sector = np.tile(np.arange(256) * 6.0 / 255.0, 2)
    # A channel is full within one sixth of the circle of its own hue, and has nothing beyond two sixths.
    distance = np.stack([np.abs((sector - own + 3.0) % 6.0 - 3.0) for own in (0.0, 2.0, 4.0)], axis=-1)
    return np.rint(255 * np.clip(distance - 1.0, 0.0, 1.0)).astype(np.uint8)[:, None]


_ABSENCE = _absence()


# --- blur ---


def gaussian_blur(image: np.ndarray, radius: float) -> np.ndarray:
    """Blur with a standard deviation of `radius` pixels: as in Pillow, three box blurs across and three down.

    In six steps, with 8 bits in between, because Pillow's rounding shows: at small radii most of the blur is lost in
    it. One step with the product of the kernels would be up to 23 levels off at the image's edges, where every step
    repeats the outermost pixels.
    """
    row = box_kernel(radius)[None]
    for kernel in (row, row, row, row.T, row.T, row.T):
        image = cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return image


def box_extent(radius: float) -> tuple[int, float]:
    """Of such a box: to how many pixels it reaches on either side, and how much of the next one is covered.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", equations 8, 13.
    """
    variance = radius * radius / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    return whole, (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))


def box_kernel(radius: float) -> np.ndarray:
    """A box blur's weights, float32 [2n + 1]: three of them have a standard deviation of `radius` together.

    The box has a fractional width: its outermost weights are smaller.
    """
    whole, fraction = box_extent(radius)
    full = 2 * (whole + fraction) + 1
    # Pillow's weights are whole numbers of 2 ** -24, cut off. That decides where a result lies halfway between two
    # levels, so it is done here too; magnified, or it would be lost in the 24 bits of a float sum.
    cut_inner = int(np.float32(2**24) / np.float32(full))
    cut_outer = (2**24 - (2 * whole + 1) * cut_inner) // 2
    inner = 1 / full + 200 * (cut_inner / 2**24 - 1 / full)
    outer = fraction / full + 200 * (cut_outer / 2**24 - fraction / full)
    return np.array([outer, *[inner] * (2 * whole + 1), outer], np.float32)
