"""Images of ``passl-visualize pca`` as features of their patches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import paddle
from PIL import Image
from tqdm import tqdm

from passl import exported
from passl.data.image_io import UnreadableImageError
from passl.models.tokens import patch_features, patch_size_of
from passl.predict import pictures, predict
from passl.visualize.attention_image import denormalized

_LARGEST = 448  # the shorter side at most, where nothing is said
_MAX_PIXELS = 2**24  # of a resized image: one of 1 x 5000 pixels would become 448 x 2,240,000
_SHOWN = 24  # pairs in the overview
_SIDE = 440  # of an image kept for it


class PatchReader:
    """Patch features of images, one after the other.

    Attributes:
        names, sizes: of those that could be read; (height, width) as the network sees them.
        shown: some of them, evenly spread, as pictures by their numbers.
        unreadable: what is wrong with the others.
    """

    def __init__(self, network: Any, image_size: Any, options: argparse.Namespace, count: int) -> None:
        self.names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.shown: dict[int, Image.Image] = {}
        self.unreadable: list[str] = []
        self._network = network
        self._image_size = image_size
        self._options = options
        self._count = count
        self._wanted = set(np.linspace(0, max(count - 1, 0), min(count, _SHOWN)).round().astype(int).tolist())

    def maps(self, files: Sequence[str]) -> Iterator[np.ndarray]:
        """The features [h, w, D] of each. Raises ValueError if the network shows no patches."""

        def network(images: np.ndarray) -> dict[str, np.ndarray]:
            self._keep(images)
            features = patch_features(self._network.backbone, paddle.to_tensor(images), self._options.layer)
            return {"features": features.astype("float32").numpy()}

        found = predict(
            network,
            pictures(files, channels=self._network.channels),
            self._transformed,
            self._options.batch_size,
            self._options.num_workers,
        )
        bar = tqdm(found, total=self._count, desc="patch features", unit="image", leave=False, disable=None)
        for result in bar:
            if result.error is not None:
                self.unreadable.append(f"{result.name}: {result.error}")
            else:
                self.names.append(result.name)
                yield result.features

    def _transformed(self, image: Any) -> np.ndarray:
        height, width = self._size(image)
        steps: list[dict[str, Any]] = [
            {"Resize": {"size": [height, width], "interpolation": "bicubic"}},
            {"ToTensor": {}},
            {"Normalize": {"mean": list(self._network.mean), "std": list(self._network.std)}},
        ]
        return exported.transform(steps)(image)

    def _size(self, image: Any) -> tuple[int, int]:
        """Height and width that the network sees, in whole patches."""
        height, width = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
        wanted = self._image_size
        if not isinstance(wanted, list):
            shorter = wanted or min(_LARGEST, height, width)
            wanted = (height * shorter / min(height, width), width * shorter / min(height, width))
        unit = patch_size_of(self._network.backbone)
        rows, columns = (max(1, round(side / unit)) * unit for side in wanted)
        if rows * columns > _MAX_PIXELS:
            raise UnreadableImageError("", f"{width} x {height} pixels would become {columns} x {rows}: too many")
        return rows, columns

    def _keep(self, images: np.ndarray) -> None:
        """Remember the sizes of a batch, and as pictures those of it that the overview shows."""
        for image in images:
            if len(self.sizes) in self._wanted:
                self.shown[len(self.sizes)] = self._picture(image)
            self.sizes.append(image.shape[1:])

    def _picture(self, image: np.ndarray) -> Image.Image:
        """[C, H, W], normalised -> a small picture"""
        mean, std = (np.asarray(one, np.float64)[:, None, None] for one in (self._network.mean, self._network.std))
        picture = Image.fromarray(denormalized(image, mean, std))
        if max(picture.size) > _SIDE:
            picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        return picture
