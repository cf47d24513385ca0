"""The views of `MultiCrop` of whole batches of tensors, made on the device where the batch is."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from passl.data.multi_crop import MultiCrop
from passl.data.photometric import say_off
from passl.data.transforms import Generator
from passl.data.views import ViewParameters, draw_view_parameters

if TYPE_CHECKING:
    from paddle import Tensor

_ROUNDING = 1e-3  # how far from 0..1 the values of pictures may lie: what resizing them twice does


class BatchMultiCrop:
    """Two global and `num_local_crops` local views of each image of a batch.

    The views are those that `MultiCrop` draws, but for the rounding to 8 bits after each operation: on average 1.3
    levels of 255 from those of Pillow, whose cut-off fractions make them about 1 level darker; single pixels by up to
    20, where Pillow's 256 hues are coarse.

    It is meant for batches on a GPU (not measured). On one core of a CPU it takes about as long as `MultiCrop` for
    images of 32 pixels in batches of 64, longer in smaller ones, and eight times as long for 224 pixels
    (benchmarks/batch_views.py): there, data workers with `MultiCrop` are the better way.

    Args:
        arguments, named: those of `MultiCrop`, with the same defaults; `backend` has no part in it.
    """

    __signature__ = inspect.signature(MultiCrop)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.multi_crop = MultiCrop(*arguments, **named)

    def __call__(self, images: Tensor, rng: Generator) -> dict[str, Tensor]:
        """Images -> float32 `global_crops` [2 * B, C, h, w] and, if any, `local_crops` [n * B, C, h, w], view by view.

        Args:
            images: [B, C, H, W], uint8 or floats in 0..1, as they come from the data set: not normalised.
            rng: everything random is drawn from it, on the host, image by image: the views are those that
                ``[MultiCrop(...)(image, rng) for image in images]`` would show.

        Raises:
            TypeError: not a Tensor, or one of other numbers.
            ValueError: of another shape, or of other values.
        """
        import paddle

        from passl.data.batch_pixels import on_device, render

        # Half precision has too few digits for positions and too few levels for colours.
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            pixels = checked_images(images)
            batch, channels, height, width = pixels.shape
            is_picture = channels == 3 and self.multi_crop.takes_pictures
            if not is_picture:
                say_off("MultiCrop", channels, self.multi_crop.photometric)
            statistics = self.multi_crop.raw_backend.normalize.statistics_of(channels)
            mean, std = (on_device(values, pixels) for values in statistics)
            result = {}
            for name, views in self._drawn(rng, batch, height, width).items():
                size = self.multi_crop.recipes[name][0].size
                result[name] = (render(pixels, views, size, is_picture) - mean) / std
            return result

    def _drawn(self, rng: Generator, batch: int, height: int, width: int) -> dict[str, list[ViewParameters]]:
        """By name, the views of all images: view by view."""
        result: dict[str, list[list[ViewParameters]]] = {name: [] for name in self.multi_crop.recipes}
        for _ in range(batch):
            for name, recipes in self.multi_crop.recipes.items():
                result[name].append([draw_view_parameters(rng, height, width, recipe) for recipe in recipes])
        return {name: [view for views in zip(*images) for view in views] for name, images in result.items()}


def checked_images(images: Any) -> Tensor:
    """Images [B, C, H, W] as float32, those of three channels in 0..1. Raises TypeError and ValueError."""
    import paddle

    if not isinstance(images, paddle.Tensor):
        raise TypeError(
            f"a batch of images must be a Tensor [B, C, H, W], not {type(images).__name__}: images of one size can be "
            "stacked with paddle.stack; MultiCrop takes single images"
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"a batch of images must be [B, C, H, W], none of them 0, not {list(images.shape)}")
    if images.dtype == paddle.uint8:
        return images.astype("float32") / 255.0
    if not images.is_floating_point():
        raise TypeError(f"a batch of images must be uint8, or floats in 0..1, not {images.dtype}")
    images = images.astype("float32")
    if images.shape[1] == 3:
        # The mean, because the lowest and the highest pass over NaN on Paddle 2.6.
        _check_values(*paddle.stack([images.min(), images.max(), images.mean()]).tolist())
    return images


def _check_values(lowest: float, highest: float, mean: float) -> None:
    if math.isfinite(mean) and lowest >= -_ROUNDING and highest <= 1.0 + _ROUNDING:
        return
    values = f"a batch of images must have values in 0..1, not {lowest:.4g}..{highest:.4g}"
    if not math.isfinite(mean):
        raise ValueError(f"{values}: some are NaN or infinite")
    if lowest >= 0.0 and 1.0 < highest <= 255.0:
        raise ValueError(f"{values}: give uint8, or divide by 255")
    raise ValueError(f"{values}: these look normalised already; give images in 0..1, and set mean and std")
