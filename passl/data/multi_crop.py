"""The views of DINO (Caron et al. 2021, section 3 and the official `DataAugmentationDINO`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from passl.data.backends import ImageInput, OpenedImage, RawBackend, is_raw, least_reduction, make_backend
from passl.data.packing import views_array
from passl.data.photometric import say_off
from passl.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Generator,
    Size,
    check_jitter_strengths,
    height_and_width,
    positive_range,
    probability,
)
from passl.data.views import ViewParameters, ViewRecipe, draw_view_parameters
from passl.registry import TRANSFORMS


@TRANSFORMS.register()
class MultiCrop:
    """Two global and `num_local_crops` local views of one image; the defaults are the official recipe.

    Args:
        global_crops_size, local_crops_size: pixels of a view, an int or `[height, width]`.
        global_crops_scale, local_crops_scale: share of the image's area that a view covers, `[low, high]`.
        num_local_crops: may be 0.
        ratio: width / height of the covered area, `[low, high]`.
        flip_prob, jitter_prob, gray_prob: the same for all views.
        brightness, contrast, saturation, hue: strengths of the colour jitter.
        blur_radius: `[low, high]` standard deviation in pixels of the view, so mind it for small views.
        global_blur_probs, global_solarize_probs: one value for each of the two global views.
        local_blur_prob: for the local views, which are never solarised.
        mean, std: of the channels, for the final normalisation.
        backend: who computes the pixels, "opencv" or "pillow"; the views are the same, up to rounding. Images that are
            not 8-bit RGB have one of their own, which does without the colours (see `passl.data.photometric`).
    """

    takes_source = True

    def __init__(
        self,
        global_crops_size: Size = 224,
        local_crops_size: Size = 96,
        global_crops_scale: Sequence[float] = (0.4, 1.0),
        local_crops_scale: Sequence[float] = (0.05, 0.4),
        num_local_crops: int = 8,
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        jitter_prob: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        gray_prob: float = 0.2,
        blur_radius: Sequence[float] = (0.1, 2.0),
        global_blur_probs: Sequence[float] = (1.0, 0.1),
        global_solarize_probs: Sequence[float] = (0.0, 0.2),
        local_blur_prob: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        backend: Literal["opencv", "pillow"] = "opencv",
    ) -> None:
        if num_local_crops < 0:
            raise ValueError(f"num_local_crops must be at least 0, not {num_local_crops!r}")
        if len(global_blur_probs) != 2 or len(global_solarize_probs) != 2:
            raise ValueError(
                "global_blur_probs and global_solarize_probs need one value for each of the two global views"
            )
        check_jitter_strengths(brightness, contrast, saturation, hue)
        shared = {
            "ratio": positive_range(ratio, "ratio"),
            "flip_prob": probability(flip_prob, "flip_prob"),
            "jitter_prob": probability(jitter_prob, "jitter_prob"),
            "jitter_strengths": (brightness, contrast, saturation, hue),
            "gray_prob": probability(gray_prob, "gray_prob"),
            "blur_radius": positive_range(blur_radius, "blur_radius"),
        }
        self.global_recipes = tuple(
            ViewRecipe(
                size=height_and_width(global_crops_size, "global_crops_size"),
                scale=positive_range(global_crops_scale, "global_crops_scale", highest=1.0),
                blur_prob=probability(blur_prob, "global_blur_probs"),
                solarize_prob=probability(solarize_prob, "global_solarize_probs"),
                **shared,
            )
            for blur_prob, solarize_prob in zip(global_blur_probs, global_solarize_probs)
        )
        self.local_recipe = ViewRecipe(
            size=height_and_width(local_crops_size, "local_crops_size"),
            scale=positive_range(local_crops_scale, "local_crops_scale", highest=1.0),
            blur_prob=probability(local_blur_prob, "local_blur_prob"),
            solarize_prob=0.0,
            **shared,
        )
        self.num_local_crops = num_local_crops
        self.recipes = {"global_crops": self.global_recipes}
        if num_local_crops:
            self.recipes["local_crops"] = (self.local_recipe,) * num_local_crops
        self.photometric = {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
            "gray_prob": gray_prob,
            "global_solarize_probs": global_solarize_probs,
        }
        self._choose_backends(backend, mean, std)

    def _choose_backends(self, backend: str, mean: Sequence[float], std: Sequence[float]) -> None:
        self.raw_backend = RawBackend(mean, std)
        # For other numbers of channels it is there for its name to be checked.
        self.backend = make_backend(backend, *((mean, std) if len(mean) == 3 else (IMAGENET_MEAN, IMAGENET_STD)))
        self.takes_pictures = len(mean) == 3

    def _open(self, image: ImageInput) -> OpenedImage:
        if self.takes_pictures and not is_raw(image):
            return self.backend.open(image)
        opened = self.raw_backend.open(image)
        say_off("MultiCrop", opened.channels, self.photometric)
        return opened

    def __call__(self, image: ImageInput, rng: Generator) -> dict[str, np.ndarray]:
        """Image -> float32 `global_crops` [2, C, h, w] and, if any, `local_crops` [n, C, h, w].

        Args:
            image: an `ImageSource`, or decoded: a Pillow image in mode RGB, or an array [H, W, C].

        Raises:
            UnreadableImageError: the source cannot be decoded.
        """
        opened = self._open(image)
        views = {
            name: [(draw_view_parameters(rng, opened.height, opened.width, recipe), recipe.size) for recipe in recipes]
            for name, recipes in self.recipes.items()
        }
        opened.decode(least_reduction(view for those in views.values() for view in those))
        return {name: self._rendered(opened, name, those) for name, those in views.items()}

    def _rendered(
        self, opened: OpenedImage, name: str, views: Sequence[tuple[ViewParameters, tuple[int, int]]]
    ) -> np.ndarray:
        array = views_array(name, (len(views), opened.channels, *views[0][1]))
        for (view, size), out in zip(views, array):
            opened.render(view, size, out)
        return array
