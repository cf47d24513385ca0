"""Images of any size for backbones that cut them into patches."""

from __future__ import annotations

import numpy as np
from paddle import Tensor, nn


def patch_side(backbone: nn.Layer) -> int:
    """What the sides of images must be multiples of, in pixels; 1 for a backbone without a ``patch_size``."""
    side = getattr(backbone, "patch_size", None)
    if side is None:
        side = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    return side if isinstance(side, int) else 1


def cut_to_patches(images: Tensor, side: int) -> Tensor:
    """[B, C, H, W] without the rows and columns at bottom and right that fill no patch, which the official networks
    ignore.

    Raises:
        ValueError: not a single patch fits in.
    """
    height, width = images.shape[-2:]
    if height < side or width < side:
        raise ValueError(
            f"an image of {height} x {width} pixels is smaller than a patch ({side}): use a larger image_size"
        )
    if height % side or width % side:
        return images[:, :, : height // side * side, : width // side * side].contiguous()
    return images


def unit_rows(features: np.ndarray, what: str) -> np.ndarray:
    """``features`` [N, D] with rows of length 1.

    Raises:
        ValueError: they are not finite.
    """
    if not np.isfinite(features).all():
        raise ValueError(f"features of {what} are not finite: the weights are damaged, or of another network")
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
