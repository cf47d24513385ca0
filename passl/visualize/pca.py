"""Features of patches as colours: their first three principal components are red, green and blue."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import numpy as np
from PIL import Image

from passl.visualize.principal import Components, Moments

_SHARE = 0.01  # of the patches that may be darker than 0 or brighter than 1 in a colour
_BINS, _REACH = 4096, 8.0  # of histograms, over so many standard deviations to both sides
_GAP, _PAIR_GAP, _SIDE = 6, 28, 220  # of the overview, in pixels
_GREY = 0.5  # of a component that there is not

Maps = Callable[[], Iterable[np.ndarray]]


@dataclass
class Colouring:
    """How features of patches become colours, the same for all images that it was made for.

    Attributes:
        colours: components of what is coloured.
        low, high: [3], the scores that are 0 and 1.
        split: the first component of all patches, for the foreground; None: everything is coloured.
        threshold: the score that parts foreground and background.
        above: whether the foreground is above it.
    """

    colours: Components
    low: np.ndarray
    high: np.ndarray
    split: Optional[Components] = None
    threshold: float = 0.0
    above: bool = True

    def mask(self, features: np.ndarray) -> np.ndarray:
        """Where the foreground is: [h, w, D] -> [h, w] bool"""
        if self.split is None:
            return np.ones(features.shape[:2], bool)
        return (self.split.scores(features)[..., 0] > self.threshold) == self.above

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Colours, not yet cut off at 0 and 1: [h, w, D] -> [h, w, 3]"""
        spread = self.high - self.low
        scaled = (self.colours.scores(features) - self.low) / np.where(spread > 0, spread, 1)
        return np.where(spread > 0, scaled, _GREY)


def fit(maps: Maps, foreground: bool = False) -> Colouring:
    """The colouring of a set of images, whatever their order. Memory does not grow with their number.

    With ``foreground`` the first component of all patches parts them in two, at the threshold that leaves the least
    variance inside of the parts (Otsu 1979); the components of the foreground alone are then coloured, as in figure 1
    of Oquab et al. 2023 (DINOv2). The foreground is the part of whose patches the smaller share lies on the border of
    an image; if the shares are equal, the smaller part; if these are too, that with the positive scores.

    Args:
        maps: gives the features [h, w, D] of the images, from the first, each time it is called.

    Raises:
        ValueError: there are no images, or a feature is not finite.
    """
    moments = Moments()
    for features in maps():
        moments.add(features.reshape(-1, features.shape[-1]))
    found = moments.components(3)
    if not foreground or not found.variances[0]:
        return _ranged(maps, Colouring(found, np.zeros(3), np.zeros(3)))
    colouring = Colouring(found, np.zeros(3), np.zeros(3), found, *_side(maps, found))
    moments = Moments()
    for features in maps():
        moments.add(features[colouring.mask(features)])
    colouring.colours = moments.components(3)
    return _ranged(maps, colouring)


def _side(maps: Maps, components: Components) -> tuple[float, bool]:
    """Threshold of the first component, and whether the foreground is above it."""
    scale = _REACH * float(np.sqrt(components.variances[0]))
    edges = np.linspace(-scale, scale, _BINS + 1)
    every, border = np.zeros(_BINS, int), np.zeros(_BINS, int)
    for features in maps():
        scores = np.clip(components.scores(features)[..., 0], -scale, scale)
        every += np.histogram(scores, edges)[0]
        border += np.histogram(scores, edges)[0] - np.histogram(scores[1:-1, 1:-1], edges)[0]
    cut = _otsu(every)
    low, high = every[:cut].sum(), every[cut:].sum()
    share_low, share_high = border[:cut].sum() * high, border[cut:].sum() * low  # both shares times low * high
    if share_low != share_high:
        return float(edges[cut]), bool(share_high < share_low)
    return float(edges[cut]), bool(high <= low)


def _otsu(counts: np.ndarray) -> int:
    """The first bin of the upper part; of several equally good ones the middle."""
    values = np.arange(len(counts)) + 0.5
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    total = np.cumsum(counts * values)
    gap = np.where(above > 0, (total[-1] - total[:-1]) / np.maximum(above, 1), 0) - total[:-1] / np.maximum(below, 1)
    between = np.where((below > 0) & (above > 0), below * above * gap**2, -1)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return int(best[len(best) // 2]) + 1


def _ranged(maps: Maps, colouring: Colouring) -> Colouring:
    """The same with ``low`` and ``high``: almost all patches lie between them."""
    scale = _REACH * np.sqrt(colouring.colours.variances)
    counts = np.zeros((3, _BINS), int)
    for features in maps():
        scores = colouring.colours.scores(features[colouring.mask(features)])
        for channel in np.flatnonzero(scale):
            clipped = np.clip(scores[:, channel], -scale[channel], scale[channel])
            counts[channel] += np.histogram(clipped, _BINS, (-scale[channel], scale[channel]))[0]
    for channel in np.flatnonzero(scale):
        shares = np.concatenate([[0], np.cumsum(counts[channel])]) / counts[channel].sum()
        edges = np.linspace(-scale[channel], scale[channel], _BINS + 1)
        rising = np.concatenate([[True], np.diff(shares) > 0])
        rising[np.flatnonzero(rising)[1:] - 1] = True  # lower edges of bins that hold something
        low, high = np.interp([_SHARE, 1 - _SHARE], shares[rising], edges[rising])
        colouring.low[channel], colouring.high[channel] = low, high
    return colouring


def paint(colouring: Colouring, features: np.ndarray, size: tuple[int, int], smooth: bool = False) -> Image.Image:
    """Features [h, w, D] as a picture of ``size`` (width, height), the background black.

    smooth: between the middles of patches instead of a square for each.
    """
    colours, mask = colouring(features), colouring.mask(features)
    method = Image.Resampling.NEAREST
    if smooth:
        method = Image.Resampling.BICUBIC if mask.all() else Image.Resampling.BILINEAR
    if not mask.all():
        # What the background would be coloured shall not bleed into the edges.
        colours = np.clip(colours, 0, 1) * mask[..., None]
    picture = np.stack([_resized(colours[..., channel], size, method) for channel in range(3)], axis=2)
    return Image.fromarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))


def _resized(plane: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, method))


def overview(pairs: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Images with their colours beside them on one sheet.

    Raises:
        ValueError: there are none.
    """
    if not pairs:
        raise ValueError("an overview needs at least one image")
    columns = min(4, int(np.ceil(np.sqrt(len(pairs) / 1.5))))
    side = 2 * _SIDE if len(pairs) == 1 else _SIDE
    shown = [[_fitted(image, side) for image in pair] for pair in pairs]
    width = max(image.width for pair in shown for image in pair)
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    heights = [max(image.height for pair in row for image in pair) for row in rows]
    pair_width = 2 * width + _GAP
    sheet = Image.new(
        "RGB",
        (columns * (pair_width + _PAIR_GAP) + _PAIR_GAP, sum(heights) + (len(rows) + 1) * _PAIR_GAP),
        "white",
    )
    top = _PAIR_GAP
    for row, height in zip(rows, heights):
        for column, (image, colours) in enumerate(row):
            # The two touch, whatever their shape; the pair stands in the middle of its place.
            left = _PAIR_GAP + column * (pair_width + _PAIR_GAP) + (width - image.width)
            down = top + (height - image.height) // 2
            sheet.paste(image, (left, down))
            sheet.paste(colours, (left + image.width + _GAP, down))
        top += height + _PAIR_GAP
    return sheet


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)


class Spool:
    """Maps of features on the disk, in a file without a name that is gone with the process.

    Used as a context manager. ``folder`` must have room for 4 bytes of each feature.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed at the end of the context)

    def add(self, features: np.ndarray) -> None:
        """features: [h, w, D]"""
        self.shapes.append(features.shape)
        self._file.write(np.ascontiguousarray(features, np.float32).tobytes())

    def __call__(self) -> Iterator[np.ndarray]:
        """All maps, in the order they came."""
        self._file.seek(0)
        for shape in self.shapes:
            count = int(np.prod(shape))
            yield np.frombuffer(self._file.read(4 * count), np.float32).reshape(shape)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
