"""Weights for RGB images in networks for images of other channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np

RGB = 3
# The convolution that sees the image: of ViT and DINOv2, XCiT, ResNet. The region transformer's input is no image.
_FIRST_CONVOLUTIONS = ("patch_embed.proj.weight", "patch_embed.proj.0.0.weight", "conv1.weight")
_PREFIXES = ("student.backbone.", "teacher.backbone.", "backbone.", "")


def inflate(weight: np.ndarray, in_chans: int) -> np.ndarray:
    """[D, 3, h, w] -> [D, in_chans, h, w]

    One channel: the sum over RGB, so that a grey image has the response that it has with three equal channels. More:
    RGB repeated cyclically, times 3 / in_chans, so that equal channels have it too where 3 divides in_chans (as timm).
    """
    wide = weight.astype(np.float32, copy=False)
    if in_chans == 1:
        result = wide.sum(axis=1, keepdims=True)
    else:
        result = wide[:, np.arange(in_chans) % RGB] * np.float32(RGB / in_chans)
    return result.astype(weight.dtype, copy=False)


def inflated(name: str, weight: np.ndarray, shape: Sequence[int]) -> Optional[np.ndarray]:
    """``weight`` with the number of channels of ``shape``, if it is a backbone's first convolution for RGB (``name``)
    and that is all that differs; else None."""
    is_first = any(name == prefix + first for prefix in _PREFIXES for first in _FIRST_CONVOLUTIONS)
    found, wanted = tuple(weight.shape), tuple(shape)
    if not is_first or len(found) != 4 or len(wanted) != 4 or found[1] != RGB or wanted[1] == RGB:
        return None
    return inflate(weight, wanted[1]) if (found[0], *found[2:]) == (wanted[0], *wanted[2:]) else None


def inflate_state(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """``state`` with first convolutions for RGB inflated where ``shapes`` have other channels; and what was done."""
    result, done = dict(state), []
    for name, shape in shapes.items():
        weight = inflated(name, state[name], shape) if name in state else None
        if weight is not None:
            result[name] = weight
            done.append(note(name, shape[1]))
    return result, done


def note(name: str, in_chans: int) -> str:
    """For the log."""
    how = "summed over RGB" if in_chans == 1 else f"repeated cyclically, times 3/{in_chans}"
    return f"{name} inflated from RGB to in_chans {in_chans} ({how})"
