"""The regulariser of DINOv2 that spreads features."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

_EPSILON = 1e-8
_LARGE = 1e15  # the squares of more would near the end of float32
_MAX_SIMILARITIES = 1 << 22  # computed at a time: 16 MB, all pairs of 2048 images


def koleo_loss(features: Tensor) -> Tensor:
    """Mean -log of the distance of each feature vector, scaled to length 1, to the nearest other (Sablayrolles et al.
    2019). features: [B, D] -> scalar, in full precision; 0 for a single image, which has no other.

    Finite, with a finite gradient, for all finite features: equal ones, zeros, and the largest that their type holds.
    """
    with paddle.amp.auto_cast(enable=False):
        x = _FullPrecision.apply(features) if features.dtype == paddle.float16 else features
        x = x if x.dtype == paddle.float64 else x.astype("float32")
        if x.shape[0] < 2:
            return (x * 0.0).sum()
        x = _unit(x)
        epsilon = paddle.full([1], _EPSILON, x.dtype)  # to a number, Paddle 2.6 would add it in float32
        difference = x - x.index_select(nearest(x)) + epsilon
        distance = paddle.sqrt((difference * difference).sum(-1))
        return -paddle.log(distance + epsilon).mean()


def _unit(x: Tensor) -> Tensor:
    """x / max(length, 1e-8) of each row. Squares do not overflow, and the limit is within the root: that of 0 has an
    infinite gradient.
    """
    largest = x.detach().abs().max(-1, keepdim=True)
    x = x / paddle.where(largest > _LARGE, largest, paddle.ones_like(largest))
    squares = (x * x).sum(-1, keepdim=True)
    return x / paddle.sqrt(paddle.maximum(squares, paddle.full([1], _EPSILON**2, x.dtype)))


@paddle.no_grad()
def nearest(x: Tensor) -> Tensor:
    """The index of each vector's nearest other, [B, D] of length 1, B >= 2 -> [B].

    Of similarities a few rows are held at a time: all would be B * B.
    """
    num_rows = x.shape[0]
    step = max(_MAX_SIMILARITIES // num_rows, 1)
    found = []
    for start in range(0, num_rows, step):
        rows = x[start : start + step]
        similarity = paddle.matmul(rows, x, transpose_y=True)
        itself = paddle.arange(start, start + rows.shape[0]).unsqueeze(1)
        similarity = similarity.put_along_axis(itself, paddle.full(itself.shape, -3.0, x.dtype), 1)
        found.append(similarity.argmax(-1))
    return paddle.concat(found)


class _FullPrecision(PyLayer):
    """float16 to float32; a gradient beyond what float16 holds becomes the largest that it does, not infinite."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.astype("float32")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        largest = float(paddle.finfo(paddle.float16).max)
        return gradient.clip(-largest, largest).astype("float16")
