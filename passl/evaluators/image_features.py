"""Features of the images of a benchmark: of any size, and of every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from paddle import Tensor

from passl.data.loader import BadSamplesError
from passl.evaluators.evaluator import map_dataset


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


def rows_of_all(
    function: Callable[[Tensor], Tensor], images: Any, batch_size: int, title: str, num_workers: int
) -> np.ndarray:
    """``function`` of every image, in their order, on every process: [N, ...]; see ``map_dataset``.

    Raises:
        ValueError: some of the images cannot be read, and none may be missing; the text names them.
        BadSamplesError: more than the ``max_bad_samples`` that may be missing cannot be read.
    """
    try:
        return map_dataset(function, images, batch_size, title, num_workers=num_workers)[0]
    except BadSamplesError as error:
        if images.max_bad_samples:
            raise
        files = "; ".join(f"{path}: {reason}" for path, reason in error.bad_samples)
        raise ValueError(f"every image of a benchmark counts, and this cannot be read: {files}") from error


def unit_rows(features: np.ndarray, what: str) -> np.ndarray:
    """``features`` [N, D] with rows of length 1.

    Raises:
        ValueError: they are not finite.
    """
    if not np.isfinite(features).all():
        raise ValueError(f"features of {what} are not finite: the weights are damaged, or of another network")
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
