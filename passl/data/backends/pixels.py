"""The operations of `passl.data.transforms` on uint8 arrays, with OpenCV.

Images are [H, W, 3], RGB; or [H, W], grey, where all three channels are equal. The results are Pillow's to within one
or two levels of 255, most of them exactly: Pillow cuts fractions off, where OpenCV rounds, and these functions make up
for it. None changes its argument.
"""

from __future__ import annotations

import functools
import itertools
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
    mean = math.floor(cv2.mean(to_gray(image))[0] + 0.5)
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
    red, green, blue = cv2.split(image)
    value = cv2.max(cv2.max(red, green), blue)
    hue, chroma = _hue_and_chroma(red, green, blue, value)
    saturation = cv2.convertScaleAbs(cv2.divide(chroma, value, scale=255, dtype=cv2.CV_32F), beta=_CUT)
    chroma = cv2.multiply(value, saturation, scale=1 / 255)
    # int() truncates towards zero before wrapping, like the cast in the official code.
    absence = np.roll(_ABSENCE, -(int(factor * 255) % 256), axis=1)
    return cv2.merge([cv2.subtract(value, cv2.multiply(chroma, cv2.LUT(hue, a), scale=1 / 255)) for a in absence])


def _hue_and_chroma(
    red: np.ndarray, green: np.ndarray, blue: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's H, and (largest - smallest), both uint8 [H, W]; `value` is the largest of the three.

    Looked up, not computed: OpenCV's own conversion is one of the 256 hues off where the rounding of floats decides,
    and that can be 6 levels in the result.
    """
    smallest = cv2.min(cv2.min(red, green), blue)
    middle = cv2.max(cv2.min(red, green), cv2.min(cv2.max(red, green), blue))
    chroma = cv2.subtract(value, smallest)
    order = ((red < green).view(np.uint8)) | ((green < blue).view(np.uint8) << 1) | ((red < blue).view(np.uint8) << 2)
    # The table's columns and rows as 16-bit numbers: (largest - middle), and 256 * order + chroma.
    places = cv2.merge([cv2.subtract(value, middle), np.zeros_like(order), chroma, order]).view(np.int16)
    return cv2.remap(_hues(), places, None, cv2.INTER_NEAREST), chroma


@functools.cache
def _hues() -> np.ndarray:
    """Pillow's H of all colours, which only the order of the channels and their differences decide.

    uint8 [8 * 256, 256]: row 256 * order + (largest - smallest), column (largest - middle); see `_hue_and_chroma` for
    the order's bits.
    """
    smallest, middle = np.mgrid[255:-1:-1, 255:-1:-1].astype(np.uint8)
    levels = np.stack([smallest, middle, np.full_like(smallest, 255)])
    table = np.zeros((8, 256, 256), np.uint8)
    for red, green, blue in itertools.permutations(range(3)):
        order = (red < green) | (green < blue) << 1 | (red < blue) << 2
        colours = np.ascontiguousarray(levels[[red, green, blue]].transpose(1, 2, 0))
        table[order] = np.asarray(Image.fromarray(colours).convert("HSV"))[..., 0]
    return table.reshape(8 * 256, 256)


def _absence() -> np.ndarray:
    """By how much of the chroma R, G and B (rows) stay below the largest, for each hue: uint8 [3, 256], 255 is all."""
    sector = np.arange(256) * 6.0 / 255.0
    # A channel is full within one sixth of the circle of its own hue, and has nothing beyond two sixths.
    distance = np.stack([np.abs((sector - own + 3.0) % 6.0 - 3.0) for own in (0.0, 2.0, 4.0)])
    return np.rint(255 * np.clip(distance - 1.0, 0.0, 1.0)).astype(np.uint8)


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


def box_kernel(radius: float) -> np.ndarray:
    """A box blur's weights, float32 [2n + 1]: three of them have a standard deviation of `radius` together.

    The box has a fractional width: its outermost weights are smaller (Gwosdek et al. 2011, "Theoretical foundations of
    Gaussian convolution by extended box filtering", equations 8 and 13).
    """
    variance = radius * radius / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    weights = np.array([fraction, *[1.0] * (2 * whole + 1), fraction])
    weights /= weights.sum()
    # Pillow's weights are whole numbers of 2 ** -24, cut off. That decides where a result lies halfway between two
    # levels, so it is done here too; magnified, or it would be lost in the 24 bits of a float sum.
    inner = int(np.float32(2**24) / np.float32(2 * (whole + fraction) + 1))
    outer = (2**24 - (2 * whole + 1) * inner) // 2
    cut = np.array([outer, *[inner] * (2 * whole + 1), outer]) / 2**24
    return (weights + 200 * (cut - weights)).astype(np.float32)
