"""Images as a training loop has them, to the views and the batches that the networks take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import paddle
from paddle import Tensor
from PIL import Image

from passl.data.batch_views import BatchMultiCrop, checked_images
from passl.data.batches import VIEW_KEYS, collate
from passl.data.image_io import to_rgb
from passl.data.multi_crop import MultiCrop
from passl.data.transforms import Normalize, Resize, ToTensor
from passl.wrapper.conf import DINOConf

Images = Union[Tensor, Sequence[Any], Mapping[str, Tensor]]
_TOLERANCE = 1e-3  # of values in [0, 1], for what resizing adds at edges


class Views:
    """The views of a batch for training, and the batch itself for evaluation."""

    def __init__(self, conf: DINOConf) -> None:
        arguments = conf.view_arguments()
        self.crop = MultiCrop(**arguments)
        self.batch_crop = BatchMultiCrop(**arguments)
        self.normalize = Normalize(conf.mean, conf.std)
        self.channels = len(conf.mean)
        size = conf.global_crop_size
        self.resize = Resize(size if isinstance(size, tuple) else (size, size), "bicubic")

    @paddle.no_grad()
    def crops(self, images: Images, rng: np.random.Generator) -> dict[str, Tensor]:
        """ "global_crops" [2*B, C, H, W] and, if any, "local_crops" [n*B, C, h, w], normalised, view by view.

        images: a Tensor [B, C, H, W], uint8 or floats in [0, 1]; a list of arrays [H, W, C] or Pillow images; or such
            views themselves, made by MultiCrop in the workers of a data loader.
        """
        if isinstance(images, Mapping):
            return _given_views(images)
        if not isinstance(images, Tensor):
            return self._crops_of(self._pictures(images), rng)
        images = self._checked(images)
        if _is_on_cpu(images):  # where many small operations are faster than few large ones
            arrays = images.numpy().transpose(0, 2, 3, 1)
            return self._crops_of([self._array(image, index) for index, image in enumerate(arrays)], rng)
        return self.batch_crop(images, rng)

    def _crops_of(self, pictures: Sequence[Any], rng: np.random.Generator) -> dict[str, Tensor]:
        views = collate([self.crop(picture, rng) for picture in pictures])
        return {name: paddle.to_tensor(array) for name, array in views.items()}

    @paddle.no_grad()
    def whole(self, images: Images) -> Tensor:
        """The normalised images themselves [B, C, H, W]; of a list of several sizes, each resized to global_crop_size.

        images: as for :meth:`crops`, but no views.
        """
        if isinstance(images, Mapping):
            raise TypeError("mode='val' takes images, not views: a Tensor [B, C, H, W] or a list of pictures")
        if isinstance(images, Tensor):
            mean, std = (paddle.to_tensor(values) for values in self.normalize.statistics_of(self.channels))
            return (self._checked(images) - mean) / std
        pictures = self._pictures(images)
        if len({np.shape(picture)[:2] for picture in pictures}) > 1:
            pictures = [self.resize(picture, None) for picture in pictures]
        return paddle.to_tensor(np.stack([self.normalize(ToTensor()(picture)) for picture in pictures]))

    def _checked(self, images: Tensor) -> Tensor:
        """As float32. Raises for what is no batch of images in uint8 or in floats in [0, 1]."""
        if images.ndim != 4:
            raise ValueError(
                f"images ({list(images.shape)}) must be [B, C, H, W]; of a single image images.unsqueeze(0), and of a "
                "stack of [B, H, W, C] images.transpose([0, 3, 1, 2])"
            )
        if images.shape[1] != self.channels:
            hint = ", and these look like [B, H, W, C]: images.transpose([0, 3, 1, 2])"
            hint = hint if images.shape[3] == self.channels else ""
            raise ValueError(
                f"images ({list(images.shape)}) have {images.shape[1]} channels, and mean and std {self.channels} "
                f"values: they must have one for each channel{hint}"
            )
        return checked_images(images)

    def _pictures(self, images: Any) -> list[Union[Image.Image, np.ndarray]]:
        """What MultiCrop opens: Pillow images in RGB, or arrays [H, W, C]."""
        if isinstance(images, np.ndarray):
            raise TypeError(
                f"images is one array {images.shape}: give paddle.to_tensor(images) if it is [B, C, H, W], or "
                "list(images) if it is [B, H, W, C]"
            )
        if not isinstance(images, (list, tuple)) or not images:
            raise TypeError(
                "images must be a Tensor [B, C, H, W], a list of arrays [H, W, C] or of Pillow images, not "
                f"{'an empty list' if isinstance(images, (list, tuple)) else repr(type(images).__name__)}"
            )
        return [self._picture(image, index, len(images)) for index, image in enumerate(images)]

    def _picture(self, image: Any, index: int, count: int) -> Union[Image.Image, np.ndarray]:
        if isinstance(image, Tensor):
            hint = "take the images out of what the data loader gives: images = batch[0]"
            if image.ndim == 3:
                hint = "make one batch of them: paddle.stack(images)"
            raise TypeError(
                f"images is a list of {count}, of which number {index} is a Tensor {list(image.shape)}: {hint}"
            )
        if isinstance(image, Image.Image):
            if self.channels == 3:
                return to_rgb(image)
            image = np.asarray(image.convert("L") if self.channels == 1 else image)
        if not isinstance(image, np.ndarray):
            raise TypeError(
                f"image {index} of the list is a {type(image).__name__}: give arrays [H, W, C] or Pillow images"
            )
        return self._array(image, index)

    def _array(self, image: np.ndarray, index: int) -> np.ndarray:
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], self.channels if self.channels in (1, 3) else 1, axis=2)
        if image.ndim != 3 or image.shape[2] != self.channels or 0 in image.shape:
            first = image.ndim == 3 and image.shape[0] == self.channels
            hint = ": these look like [C, H, W], give image.transpose(1, 2, 0)" if first else ""
            raise ValueError(
                f"image {index} of the list is {list(image.shape)}, and must be [H, W, {self.channels}], because mean "
                f"and std have {self.channels} values{hint}"
            )
        if self.channels == 3 and np.issubdtype(image.dtype, np.floating):
            low, high = float(image.min()), float(image.max())
            if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
                raise ValueError(_wrong_range(low, high))
            # The views' colours are made of 8-bit pictures.
            return np.rint(image.clip(0.0, 1.0) * 255.0).astype(np.uint8)
        if self.channels == 3 and image.dtype != np.uint8:
            raise TypeError(f"image {index} of the list is {image.dtype}: give uint8 (0 to 255) or floats in [0, 1]")
        return image


def _is_on_cpu(images: Tensor) -> bool:
    return images.place.is_cpu_place()


def _wrong_range(low: float, high: float) -> str:
    found = f"images have values from {low:.3g} to {high:.3g}; floats must be in [0, 1]"
    if not math.isfinite(low + high):
        return f"{found}: some are NaN or infinite"
    if low >= 0 and high <= 255:
        return f"{found}: divide by 255, or give uint8"
    return f"{found}, not normalised: leave out Normalize, the wrapper does it with mean and std"


def _given_views(views: Mapping[str, Any]) -> dict[str, Tensor]:
    unknown = [name for name in views if name not in (*VIEW_KEYS, "masks")]
    if unknown or VIEW_KEYS[0] not in views:
        raise ValueError(
            f"images is a dict of {', '.join(map(str, views)) or 'nothing'}: views are 'global_crops' [2*B, C, H, W] "
            "and, if any, 'local_crops' [n*B, C, h, w], view by view and normalised"
        )
    return {name: view if isinstance(view, Tensor) else paddle.to_tensor(view) for name, view in views.items()}
