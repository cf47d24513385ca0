"""The views of DINO (Caron et al. 2021, section 3 and the official `DataAugmentationDINO`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from PIL import Image

from passl.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Box,
    Generator,
    JitterSteps,
    Normalize,
    Size,
    ToTensor,
    apply_color_jitter,
    check_jitter_strengths,
    draw_color_jitter,
    draw_crop_box,
    gaussian_blur,
    grayscale,
    height_and_width,
    horizontal_flip,
    positive_range,
    probability,
    resized_crop,
    solarize,
)
from passl.registry import TRANSFORMS


@dataclass(frozen=True)
class ViewRecipe:
    """What one kind of view may look like. `size`: (height, width) in pixels; `scale`: share of the area."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip_prob: float
    jitter_prob: float
    jitter_strengths: tuple[float, float, float, float]
    gray_prob: float
    blur_prob: float
    blur_radius: tuple[float, float]
    solarize_prob: float


@dataclass(frozen=True)
class ViewParameters:
    """What one view does look like: everything random about it. `blur_radius` None means no blur."""

    box: Box
    flip: bool
    jitter: JitterSteps
    gray: bool
    blur_radius: Optional[float]
    solarize: bool


def draw_view_parameters(rng: Generator, height: int, width: int, recipe: ViewRecipe) -> ViewParameters:
    """Draw one view of an image of `height` x `width` pixels."""
    return ViewParameters(
        box=draw_crop_box(rng, height, width, recipe.scale, recipe.ratio),
        flip=rng.random() < recipe.flip_prob,
        jitter=draw_color_jitter(rng, *recipe.jitter_strengths) if rng.random() < recipe.jitter_prob else (),
        gray=rng.random() < recipe.gray_prob,
        blur_radius=rng.uniform(*recipe.blur_radius) if rng.random() < recipe.blur_prob else None,
        solarize=rng.random() < recipe.solarize_prob,
    )


def render_view(image: Image.Image, view: ViewParameters, size: tuple[int, int]) -> Image.Image:
    """Apply `view` to an RGB image, in the official order; the result has `size` (height, width)."""
    image = resized_crop(image, view.box, size, "bicubic")
    if view.flip:
        image = horizontal_flip(image)
    image = apply_color_jitter(image, view.jitter)
    if view.gray:
        image = grayscale(image)
    if view.blur_radius is not None:
        image = gaussian_blur(image, view.blur_radius)
    if view.solarize:
        image = solarize(image)
    return image


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
    """

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
        self.to_tensor = ToTensor()
        self.normalize = Normalize(mean, std)

    def __call__(self, image: Image.Image, rng: Generator) -> dict[str, np.ndarray]:
        """RGB image -> float32 `global_crops` [2, 3, h, w] and, if any, `local_crops` [n, 3, h, w]."""
        views = {"global_crops": self._views(image, rng, self.global_recipes)}
        if self.num_local_crops:
            views["local_crops"] = self._views(image, rng, (self.local_recipe,) * self.num_local_crops)
        return views

    def _views(self, image: Image.Image, rng: Generator, recipes: Sequence[ViewRecipe]) -> np.ndarray:
        return np.stack([self._view(image, rng, recipe) for recipe in recipes])

    def _view(self, image: Image.Image, rng: Generator, recipe: ViewRecipe) -> np.ndarray:
        view = draw_view_parameters(rng, image.height, image.width, recipe)
        return self.normalize(self.to_tensor(render_view(image, view, recipe.size)))
