"""Mean and standard deviation of each channel over all pixels of a data set."""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np

from passl.data.errors import UnreadableImageError
from passl.data.image_io import ImageSource
from passl.data.raw_images import full_scale, is_eight_bit, read_array
from passl.data.samples import ImageSamples

# Samples that a process takes at a time. Sums are merged in their order: the result is the same for any number of
# processes.
_CHUNK = 16
_NUM_LOOKED_AT = 32

BadImages = list[tuple[str, str]]


@dataclass
class ChannelStatistics:
    """Of all pixels seen so far, in the units of `passl.data.raw_images.unit_floats`.

    Attributes:
        num_pixels: of one channel.
        mean, squares: float64 [C]; squares are the sums of the squared deviations from the mean.
        lowest, highest: float64 [C].
        num_images, dtypes: how many, in all and of each type.
        smallest, largest: (height, width), each the extreme of its own.
    """

    num_pixels: int = 0
    mean: Optional[np.ndarray] = None
    squares: Optional[np.ndarray] = None
    lowest: Optional[np.ndarray] = None
    highest: Optional[np.ndarray] = None
    num_images: int = 0
    dtypes: Counter = field(default_factory=Counter)
    smallest: Optional[tuple[int, int]] = None
    largest: Optional[tuple[int, int]] = None

    @property
    def std(self) -> np.ndarray:
        """[C] float64, of the pixels as the whole population."""
        return np.sqrt(self.squares / self.num_pixels)


def of_image(array: np.ndarray) -> ChannelStatistics:
    """The statistics of one image [H, W, C]."""
    height, width, channels = array.shape
    scale = full_scale(array.dtype)
    mean, squares, lowest, highest = np.empty((4, channels))
    for channel in range(channels):
        # One channel at a time: float64 needs up to eight times the memory of the image.
        values = array[:, :, channel].astype(np.float64).ravel()
        lowest[channel], highest[channel] = values.min() / scale, values.max() / scale
        average = values.mean()
        values -= average
        mean[channel], squares[channel] = average / scale, np.dot(values, values) / scale**2
    return ChannelStatistics(
        height * width, mean, squares, lowest, highest, 1, Counter([str(array.dtype)]), (height, width), (height, width)
    )


def merged(one: ChannelStatistics, other: ChannelStatistics) -> ChannelStatistics:
    """The statistics of both sets of pixels together (Chan et al. 1979, which cancels no digits)."""
    if not one.num_images or not other.num_images:
        return one if one.num_images else other
    count = one.num_pixels + other.num_pixels
    step = other.mean - one.mean
    share = other.num_pixels / count
    return ChannelStatistics(
        num_pixels=count,
        mean=one.mean + step * share,
        squares=one.squares + other.squares + step**2 * (one.num_pixels * share),
        lowest=np.minimum(one.lowest, other.lowest),
        highest=np.maximum(one.highest, other.highest),
        num_images=one.num_images + other.num_images,
        dtypes=one.dtypes + other.dtypes,
        smallest=tuple(map(min, one.smallest, other.smallest)),
        largest=tuple(map(max, one.largest, other.largest)),
    )


class Concatenated:
    """The images of several data sets one after the other, each as `channels` says."""

    def __init__(self, datasets: Sequence[ImageSamples], channels: Optional[int] = None) -> None:
        self.datasets = list(datasets)
        self.channels = channels
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> ImageSource:
        """Raises UnreadableImageError."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        dataset = self.datasets[number]
        return replace(dataset.read(index - int(self._ends[number]) + len(dataset)), channels=self.channels)

    def array(self, index: int) -> np.ndarray:
        """[H, W, C] of the type that training sees. Raises UnreadableImageError."""
        return np.asarray(self.read(index).image())


def usual_channels(images: Concatenated) -> int:
    """How many channels most of up to 32 images have, which are spread over the set; 3 where training would read a
    set of 8-bit pictures, some of them colour, as RGB.

    Raises:
        UnreadableImageError: none of them can be read.
    """
    counts: Counter = Counter()
    eight_bit, problem = True, None
    for index in np.unique(np.linspace(0, len(images) - 1, _NUM_LOOKED_AT).astype(int)):
        try:
            source = images.read(int(index))
            counts[read_array(source.name, source.data).shape[2]] += 1
            eight_bit = eight_bit and is_eight_bit(source.data)
        except UnreadableImageError as error:
            problem = error
    if not counts:
        raise problem
    return 3 if eight_bit and 3 in counts else counts.most_common(1)[0][0]


def measure(
    images: Concatenated, indices: Sequence[int], num_workers: int = 0
) -> Iterator[tuple[int, ChannelStatistics, BadImages]]:
    """Measure the images `indices`, in chunks: yields how many are done, the statistics of all of them so far, and
    (name, reason) of those in the last chunk that cannot be read.

    Raises:
        OSError: a worker process was killed.
    """
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    total, done = ChannelStatistics(), 0
    for chunk, (part, bad) in zip(chunks, _outcomes(images, chunks, num_workers)):
        total, done = merged(total, part), done + len(chunk)
        yield done, total, bad


def _outcomes(
    images: Concatenated, chunks: list[Sequence[int]], num_workers: int
) -> Iterator[tuple[ChannelStatistics, BadImages]]:
    if num_workers == 0:
        yield from (_measure_chunk(images, chunk) for chunk in chunks)
        return
    # Forks share the list of files; elsewhere it is sent to each process once.
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else None)
    try:
        with ProcessPoolExecutor(num_workers, context, _prepare, (images,)) as pool:
            yield from pool.map(_measure_prepared, chunks)
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed: not enough memory? Try a smaller --num-workers") from error


_prepared: list[Concatenated] = []  # of a worker process


def _prepare(images: Concatenated) -> None:
    _prepared[:] = [images]


def _measure_prepared(chunk: Sequence[int]) -> tuple[ChannelStatistics, BadImages]:
    return _measure_chunk(_prepared[0], chunk)


def _measure_chunk(images: Concatenated, chunk: Sequence[int]) -> tuple[ChannelStatistics, BadImages]:
    total, bad = ChannelStatistics(), []
    for index in chunk:
        try:
            total = merged(total, of_image(images.array(int(index))))
        except UnreadableImageError as error:
            bad.append((error.path, error.reason))
    return total, bad
