"""What a view of an image may look like, and drawing one: everything random about multi-crop is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

from passl.data.transforms import Box, Generator, JitterSteps, draw_color_jitter, draw_crop_box, uniform


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


class ViewParameters(NamedTuple):
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
        blur_radius=uniform(rng, *recipe.blur_radius) if rng.random() < recipe.blur_prob else None,
        solarize=rng.random() < recipe.solarize_prob,
    )
