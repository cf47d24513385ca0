"""What a loader needs of a data set, and what all data sets of images share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Optional

import numpy as np

from passl.data.image_io import AnyImage, ImageSource


class Samples:
    """A data set: numbered samples, labelled or not.

    Attributes:
        labels: int64 array [len(self)], or None.
        class_names: the class of label i is `class_names[i]`; empty without labels, or where they are only numbers.
        max_bad_samples: how many different unreadable samples a `Loader` replaces before it gives up.
        pool: indices of the samples that may replace them, where only a share of the data is used; None: all.
    """

    pool: Optional[np.ndarray] = None

    def __init__(self, labels: Optional[Sequence[int]], class_names: Sequence[str], max_bad_samples: int) -> None:
        if max_bad_samples < 0:
            raise ValueError(f"max_bad_samples must be at least 0, not {max_bad_samples!r}")
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.class_names = list(class_names)
        self.max_bad_samples = max_bad_samples

    def __len__(self) -> int:
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Where sample `index` comes from, for messages: a path, or `tarball!member`."""
        raise NotImplementedError

    def content(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The arrays of sample `index`, by name. Raises UnreadableImageError."""
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`content`, with `index` and, if there are labels, `label`; both int64. Raises UnreadableImageError."""
        sample = self.content(index, rng)
        sample["index"] = np.int64(index)
        if self.labels is not None:
            sample["label"] = self.labels[index]
        return sample


class ImageSamples(Samples):
    """Images and what is done with each.

    Args:
        transform: called as `transform(image, rng)` with the image in mode RGB; one with a true attribute
            `takes_source` gets the `ImageSource` and decodes it by itself.
        channels: None: every image becomes 8-bit RGB. A number: images are read as they are stored, must have so many
            channels, and reach the transform as arrays [H, W, C] (see `ImageSource.image`).
    """

    def __init__(
        self,
        labels: Optional[Sequence[int]],
        class_names: Sequence[str],
        transform: Optional[Callable[..., Any]],
        max_bad_samples: int,
        channels: Optional[int] = None,
    ) -> None:
        super().__init__(labels, class_names, max_bad_samples)
        if channels is not None and channels < 1:
            raise ValueError(f"channels ({channels}) must be at least 1, or null for 8-bit RGB")
        self.transform = transform
        self.channels = channels

    def read(self, index: int) -> ImageSource:
        """The undecoded image. Raises UnreadableImageError."""
        raise NotImplementedError

    def source(self, index: int) -> ImageSource:
        """`read`, with what this data set says of the channels. Raises UnreadableImageError."""
        source = self.read(index)
        return source if self.channels is None else replace(source, channels=self.channels)

    def load(self, index: int) -> AnyImage:
        """The image, untransformed: in mode RGB, or with `channels` an array. Raises UnreadableImageError."""
        return self.source(index).image()

    def content(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The transformed image as `image`, or what the transform returns, if that is a dict."""
        source = self.source(index)
        takes_source = getattr(self.transform, "takes_source", False)
        image = source if takes_source else source.image()
        transformed = image if self.transform is None else self.transform(image, rng)
        return dict(transformed) if isinstance(transformed, dict) else {"image": transformed}
