"""The regulariser of DINOv2 that spreads features."""

from __future__ import annotations

import paddle
from paddle import Tensor

_EPSILON = 1e-8


def koleo_loss(features: Tensor) -> Tensor:
    """Mean -log of the distance of each feature vector, scaled to length 1, to the nearest other (Sablayrolles et al.
    2019). features: [B, D] -> scalar, in full precision; 0 for a single image, which has no other.
    """
    with paddle.amp.auto_cast(enable=False):
        x = features if features.dtype == paddle.float64 else features.astype("float32")
        if x.shape[0] < 2:
            return (x * 0.0).sum()
        x = x / paddle.sqrt((x * x).sum(-1, keepdim=True)).clip(min=_EPSILON)
        distance = paddle.sqrt(((x - x[nearest(x)] + _EPSILON) ** 2).sum(-1))
        return -paddle.log(distance + _EPSILON).mean()


@paddle.no_grad()
def nearest(x: Tensor) -> Tensor:
    """The index of each vector's nearest other, [B, D] of length 1 -> [B]."""
    similarity = paddle.matmul(x, x, transpose_y=True)
    return (similarity - 3.0 * paddle.eye(x.shape[0], dtype=x.dtype)).argmax(-1)
