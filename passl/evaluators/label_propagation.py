"""Labels of a first frame carried through a video by the similarity of patches (Jabri et al. 2020, as in DINO)."""

from __future__ import annotations

from collections import deque

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import functional as F

_MAX_AFFINITIES = 1 << 24  # numbers held at a time: 64 MB of float32


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
        self._first = _unit(features), labels
        self._latest: deque = deque(maxlen=num_frames)
        self.radius = radius
        self.topk = topk
        self.temperature = temperature

    def step(self, features: Tensor) -> Tensor:
        """The labels of the next frame: [h, w, D] -> [h, w, C]."""
        targets = _unit(features)
        frames = [self._first, *self._latest]
        sources, labels = (paddle.stack(parts) for parts in zip(*frames))
        height, width = targets.shape[:2]
        reach = self.radius or max(height, width)
        window = min(height, 2 * reach + 1)
        rows_at_once = max(1, _MAX_AFFINITIES // (width * len(frames) * window * width))
        found = []
        for top in range(0, height, rows_at_once):
            bottom = min(height, top + rows_at_once)
            first, last = max(0, top - reach), min(height, bottom + reach)
            near = _near((top, bottom), (first, last), width, reach)
            near = paddle.to_tensor(np.tile(near, (1, len(frames))))
            found.append(self._labels(targets[top:bottom], sources[:, first:last], labels[:, first:last], near))
        result = paddle.concat(found).reshape([height, width, -1])
        self._latest.append((targets, result))
        return result

    def _labels(self, targets: Tensor, sources: Tensor, labels: Tensor, near: Tensor) -> Tensor:
        """targets [r, w, D], sources [F, s, w, D], labels [F, s, w, C], near [r*w, F*s*w] -> [r*w, C]"""
        dim, classes = targets.shape[-1], labels.shape[-1]
        similarity = paddle.matmul(targets.reshape([-1, dim]), sources.reshape([-1, dim]), transpose_y=True)
        affinity = paddle.exp(similarity / self.temperature) * near
        least = paddle.topk(affinity, min(self.topk, affinity.shape[1]), axis=1)[0][:, -1:]
        affinity = affinity * (affinity >= least).astype(affinity.dtype)
        return paddle.matmul(affinity, labels.reshape([-1, classes])) / affinity.sum(1, keepdim=True)


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


def _near(targets: tuple[int, int], sources: tuple[int, int], width: int, reach: int) -> np.ndarray:
    """[target rows * width, source rows * width] float32: 1 for patches that are at most ``reach`` apart on each axis."""
    columns = np.arange(width)
    beside = np.abs(columns[:, None] - columns) <= reach
    over = np.abs(np.arange(*targets)[:, None] - np.arange(*sources)) <= reach
    near = over[:, None, :, None] & beside[None, :, None, :]
    return near.reshape(over.shape[0] * width, over.shape[1] * width).astype(np.float32)
