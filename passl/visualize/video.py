"""The attention of a network on each frame of a video."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, Optional, Union

import numpy as np
import paddle
from paddle import nn
from PIL import Image

from passl.models.tokens import patch_size_of
from passl.visualize.attention_image import prepare, resized
from passl.visualize.attention_maps import coloured, overlaid, stretched, top_mass_masks, upsampled
from passl.visualize.attention_view import View
from passl.visualize.video_source import Frame

logger = logging.getLogger("passl")

_MAX_PATCHES = 6400  # of a frame that nobody said how to resize
_FEWER_PATCHES = 3600  # to which a larger one is shrunk: 480 x 480 in patches of 8
_BATCH_NUMBERS = 2**26  # attention weights at once
_DIMMED = 0.2


@dataclass(frozen=True)
class Look:
    """How a map is drawn.

    Attributes:
        layout: the map alone, over the frame, or beside it.
        alpha: the map's share in an overlay.
        threshold: pixels outside the patches that hold this share of the attention are black (in an overlay: the frame
            dimmed, without colour); None shows all.
        cmap: a colour map of matplotlib.
        scale: which values are dark and bright. "frame": the smallest and largest of each frame, as in the official
            code, which flickers; "smooth": these, averaged over about half a second.
    """

    layout: Literal["map", "overlay", "side-by-side"] = "map"
    alpha: float = 0.6
    threshold: Optional[float] = None
    cmap: str = "inferno"
    scale: Literal["smooth", "frame"] = "smooth"


class Drawn(NamedTuple):
    """frame: as the network saw it; attention: its map in colour; picture: what the video shows. uint8 [H, W, 3]."""

    frame: np.ndarray
    attention: np.ndarray
    picture: np.ndarray
    time: Optional[Fraction]


def frames_as_they_are(frames: Iterable[Frame], size: Optional[Union[int, Sequence[int]]] = None) -> Iterator[Drawn]:
    """Frames that are maps already, resized if ``size`` is given (of the shorter side, or [height, width]).

    Raises:
        ValueError: that is larger than any video can be.
    """
    for frame in frames:
        image = frame.image
        if size is not None:
            image = np.asarray(resized(Image.fromarray(image), size))
        yield Drawn(image, image, image, frame.time)


def _size_for(image: np.ndarray, patch_size: int) -> Optional[list[int]]:
    """[height, width] for frames whose attention would take too long and too much memory, None if they are fine."""
    height, width = image.shape[:2]
    patches = (height // patch_size) * (width // patch_size)
    if patches <= _MAX_PATCHES or patch_size == 1:  # 1: a network without patches, which says so itself
        return None
    factor = (_FEWER_PATCHES / patches) ** 0.5
    size = [max(patch_size, round(side * factor / patch_size) * patch_size) for side in (height, width)]
    logger.warning(
        f"frames of {height} x {width} pixels have {patches} patches: they are made {size[0]} x {size[1]} "
        "(--resize for another size)"
    )
    return size


def attention_frames(
    frames: Iterable[Frame],
    backbone: nn.Layer,
    view: View,
    look: Look,
    mean: Sequence[float],
    std: Sequence[float],
    size: Optional[Union[int, Sequence[int]]] = None,
    rate: Fraction = Fraction(25),
) -> Iterator[Drawn]:
    """A drawn frame for each frame, while these come; a batch of them is in memory.

    Args:
        view: of one map, so not of all heads.
        mean, std: of the channels, for the network.
        size: the network's and the picture's, of the shorter side or [height, width]; None for that of the frames. They
            are cut at the right and bottom to whole patches.
        rate: frames a second.

    Raises:
        ValueError: the backbone has no such attention; frames have no whole patch, or far too many.
    """
    patch_size = patch_size_of(backbone)
    colours = _Range(look.scale, rate)
    waiting: list[tuple[np.ndarray, np.ndarray, Optional[Fraction]]] = []
    seen = False
    for frame in frames:
        if size is None and not seen:
            size = _size_for(frame.image, patch_size)
        seen = True
        prepared = prepare(Image.fromarray(frame.image), size, patch_size, mean, std)
        shown = _as_seen(frame.image, prepared.resized, prepared.size)
        waiting.append((prepared.tensor, shown, frame.time))
        if len(waiting) >= _batch_size(prepared.size, patch_size):
            yield from _drawn(waiting, backbone, view, look, colours)
            waiting = []
    if waiting:
        yield from _drawn(waiting, backbone, view, look, colours)


def _batch_size(size: tuple[int, int], patch_size: int) -> int:
    tokens = 1 + (size[0] // patch_size) * (size[1] // patch_size)
    return max(1, min(16, _BATCH_NUMBERS // (8 * tokens * tokens)))


def _as_seen(image: np.ndarray, resized: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The frame in its own colours, at the size of the network's input."""
    if image.shape[:2] != resized:
        image = np.asarray(Image.fromarray(image).resize((resized[1], resized[0]), Image.Resampling.BILINEAR))
    return image[: size[0], : size[1]]


def _drawn(
    waiting: Sequence[tuple[np.ndarray, np.ndarray, Optional[Fraction]]],
    backbone: nn.Layer,
    view: View,
    look: Look,
    colours: _Range,
) -> Iterator[Drawn]:
    maps, names = view.maps(backbone, paddle.to_tensor(np.stack([tensor for tensor, _, _ in waiting])))
    if len(names) != 1:
        raise ValueError(f"a video shows one map: say which of {', '.join(names)}, or their mean")
    for values, (_, frame, time) in zip(maps[:, 0], waiting):
        level = stretched(values, *colours.of(values))
        mask = None if look.threshold is None else top_mass_masks(values[None], look.threshold)[0]
        yield _draw(frame, level, mask, look, time)


def _draw(
    frame: np.ndarray, level: np.ndarray, mask: Optional[np.ndarray], look: Look, time: Optional[Fraction]
) -> Drawn:
    """level: [h, w] in 0..1; mask: [h, w]"""
    height, width = frame.shape[:2]
    level = upsampled(level, height, width)
    attention = coloured(level, look.cmap)
    picture = overlaid(frame, level, look.cmap, look.alpha) if look.layout == "overlay" else None
    if mask is not None:
        outside = ~upsampled(mask, height, width)
        attention[outside] = 0
        if picture is not None:
            picture[outside] = (frame[outside] * _DIMMED + 0.5).astype(np.uint8)
    if look.layout == "side-by-side":
        picture = np.concatenate([frame, attention], axis=1)
    return Drawn(frame, attention, attention if picture is None else picture, time)


class _Range:
    """The values that are black and bright, from frame to frame."""

    def __init__(self, scale: str, rate: Fraction) -> None:
        # Half a second; a slide show of single frames is not averaged.
        self._new = 1.0 if scale == "frame" else min(1.0, 1.0 / max(1.0, float(rate) / 2))
        self._range: Optional[np.ndarray] = None

    def of(self, values: np.ndarray) -> tuple[float, float]:
        own = np.array([values.min(), values.max()], np.float64)
        self._range = own if self._range is None else (1 - self._new) * self._range + self._new * own
        return float(self._range[0]), float(self._range[1])
