"""Labels of a first frame carried through a video by the similarity of patches (Jabri et al. 2020, as in DINO)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Union

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import functional as F

from passl.evaluators.neighbours import lower_bounds

Array = Union[np.ndarray, Tensor]

_MAX_AFFINITIES = 1 << 24  # numbers held at a time: 64 MB of float32
_TILE = 16  # patches on a side


class LabelPropagation:
    """Each patch gets the mean label of the most similar patches near it, in the first and in the latest frames.

    What is held does not grow with the length of the video.

    Args:
        features, labels: of the first frame's patches, [h, w, D] and [h, w, C].
        num_frames: how many of the latest frames are asked besides the first.
        radius: how far away, in patches along either side, a patch may be; 0: anywhere.
        topk: how many patches are asked; all that are as similar as the last of them are asked, too.
        temperature: of the weights exp(similarity / temperature).
    """

    def __init__(
        self, features: Tensor, labels: Tensor, num_frames: int, radius: int, topk: int, temperature: float
    ) -> None:
        self._on_gpu = paddle.get_device().startswith("gpu")
        self._first = self._held(_unit(features)), self._held(labels)
        self._latest: deque = deque(maxlen=num_frames)
        self.radius = radius
        self.topk = topk
        self.temperature = temperature

    def step(self, features: Tensor) -> Tensor:
        """The labels of the next frame: [h, w, D] -> [h, w, C]."""
        targets = self._held(_unit(features))
        frames = [self._first, *self._latest]
        stack, joined, found = (
            (paddle.stack, paddle.concat, _by_paddle) if self._on_gpu else (np.stack, np.concatenate, _by_numpy)
        )
        sources, labels = (stack(parts) for parts in zip(*frames))
        height, width = targets.shape[:2]
        reach = self.radius or max(height, width)
        side = _tile_side(len(frames) * min(height, 2 * reach + _TILE) * min(width, 2 * reach + _TILE))
        rows = []
        for top in range(0, height, side):
            tiles = []
            for left in range(0, width, side):
                # Of targets in a tile only those sources are compared that may be near.
                target = _part(targets, (top, top + side), (left, left + side))
                window = (max(0, top - reach), top + side + reach), (max(0, left - reach), left + side + reach)
                near = _near((top, left), target.shape, window, (height, width), reach)
                parts = target, _part(sources, *window), _part(labels, *window), near
                tiles.append(found(*parts, self.topk, self.temperature))
            rows.append(joined(tiles, 1))
        result = joined(rows, 0)
        self._latest.append((targets, result))
        return result if self._on_gpu else paddle.to_tensor(result)

    def _held(self, values: Tensor) -> Array:
        return values if self._on_gpu else values.numpy()


def _by_numpy(
    targets: np.ndarray, sources: np.ndarray, labels: np.ndarray, near: np.ndarray, topk: int, temperature: float
) -> np.ndarray:
    """targets [r, c, D], sources [F, h, w, D], labels [F, h, w, C], near [r*c, h*w] -> [r, c, C]"""
    # Products by numpy: on a CPU faster than Paddle's. Of the affinities few are looked at twice.
    dim, count = targets.shape[-1], len(near)
    affinity = np.matmul(targets.reshape(-1, dim), sources.reshape(-1, dim).T)
    affinity /= np.float32(temperature)
    np.exp(affinity, out=affinity)
    by_frame = affinity.reshape(count, -1, near.shape[1])
    by_frame *= near[:, None]
    topk = min(topk, affinity.shape[1])
    limits = np.maximum(lower_bounds(affinity, topk), np.finfo(np.float32).tiny)
    rows, columns = np.divmod(np.flatnonzero(affinity >= limits[:, None]), affinity.shape[1])
    values = affinity[rows, columns]
    falling = np.lexsort((-values, rows))
    counts = np.bincount(rows, minlength=count)
    least = values[falling][np.cumsum(counts) - counts + np.minimum(counts, topk) - 1]
    weights = np.where(values >= least[rows], values, 0)
    asked = labels.reshape(-1, labels.shape[-1])[columns].T
    sums = np.stack([np.bincount(rows, weights * label, count) for label in asked], axis=1)
    found = sums / np.bincount(rows, weights, count)[:, None]
    return found.astype(np.float32).reshape(*targets.shape[:2], -1)


def _by_paddle(
    targets: Tensor, sources: Tensor, labels: Tensor, near: np.ndarray, topk: int, temperature: float
) -> Tensor:
    dim, classes = targets.shape[-1], labels.shape[-1]
    affinity = paddle.matmul(targets.reshape([-1, dim]), sources.reshape([-1, dim]), transpose_y=True)
    affinity = paddle.exp(affinity / temperature)
    by_frame = affinity.reshape([len(near), -1, near.shape[1]]) * paddle.to_tensor(near).unsqueeze(1)
    affinity = by_frame.reshape(affinity.shape)
    least = paddle.topk(affinity, min(topk, affinity.shape[1]), axis=1)[0][:, -1:]
    affinity = affinity * (affinity >= least).astype(affinity.dtype)
    found = paddle.matmul(affinity, labels.reshape([-1, classes])) / affinity.sum(1, keepdim=True)
    return found.reshape([*targets.shape[:2], classes])


def segment(labels: Tensor, height: int, width: int) -> np.ndarray:
    """The strongest label of each pixel, each label stretched to 0..1 over the image before: [h, w, C] ->
    [height, width] uint8.
    """
    maps = F.interpolate(
        labels.transpose([2, 0, 1]).unsqueeze(0), size=[height, width], mode="bilinear", align_corners=False
    )
    maps = maps[0].numpy()
    for values in maps:
        if values.max() > 0:
            values -= values.min()
            # A label that is the same everywhere is the strongest everywhere.
            values[:] = values / values.max() if values.max() > 0 else np.inf
    return maps.argmax(0).astype(np.uint8)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.astype("float32"), axis=-1)


def _tile_side(num_sources: int) -> int:
    """The side of the square of targets that are compared with ``num_sources`` patches at once."""
    return max(1, min(_TILE, math.isqrt(_MAX_AFFINITIES // num_sources)))


def _part(grids: Array, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    """[..., h, w, D] -> the part of the grid"""
    return grids[..., rows[0] : rows[1], columns[0] : columns[1], :]


def _near(
    corner: tuple[int, int], targets: Sequence[int], window: Sequence[tuple[int, int]], grid: Sequence[int], reach: int
) -> np.ndarray:
    """[targets, sources] float32: 1 where patches are at most ``reach`` apart along each axis.

    corner: first row and column of the targets; targets: how many rows and columns; window: those of the sources.
    """
    rows, columns = (
        np.abs(np.arange(start, start + count)[:, None] - np.arange(first, min(last, size))) <= reach
        for start, count, (first, last), size in zip(corner, targets, window, grid)
    )
    near = rows[:, None, :, None] & columns[None, :, None, :]
    return near.reshape(rows.shape[0] * columns.shape[0], -1).astype(np.float32)
