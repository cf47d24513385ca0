"""Resizing position embeddings along one axis, as a matrix [out, in]: in numpy, and as operations of a program.

Matrices, because F.interpolate rounds the scale to float32 even in float64, and its sizes cannot be symbolic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Optional, Union

import numpy as np
import paddle
from paddle import Tensor, nn

from passl.cubic import cubic_parts, cubic_weights

Mode = Literal["scale", "size", "antialias"]
MODES = ("scale", "size", "antialias")


def resize_scale(mode: Mode, in_size: int, out_size: Union[int, Tensor]) -> Union[float, Tensor]:
    """How much larger the output is, for the modes of VisionTransformer."""
    # The official offset of 0.1 was to guard the size against rounding down, but it changes the scale too.
    return (out_size + 0.1) / in_size if mode == "scale" else out_size / in_size


def resize_matrix(mode: Mode, in_size: int, out_size: int, dtype: type) -> np.ndarray:
    """Bicubic interpolation (borders repeated), antialiased in that mode.

    dtype: the precision of the coordinates; PyTorch computes those of float32 tensors in float32, with one rounding
    (fused multiply-add).
    """
    if mode == "antialias":
        return _antialias_matrix(in_size, out_size, dtype)
    scale = resize_scale(mode, in_size, out_size)
    center = (dtype(1.0 / scale) * (np.arange(out_size) + 0.5) - 0.5).astype(dtype).astype(np.float64)
    matrix = np.zeros([out_size, in_size])
    for offset in (-1, 0, 1, 2):
        index = np.floor(center) + offset
        source = np.clip(index, 0, in_size - 1).astype(np.int64)
        np.add.at(matrix, (np.arange(out_size), source), cubic_weights(np.abs(center - index), -0.75))
    return matrix


def resize_positions(state: Mapping[str, np.ndarray], model: nn.Layer) -> tuple[dict[str, np.ndarray], list[str]]:
    """``state`` with the position embeddings of other square grids than those in ``model`` resized to these, as the
    model's own transformers resize them to the images of that size; and what was done.
    """
    result, done = dict(state), []
    for prefix, layer in model.named_sublayers(include_self=True):
        name = f"{prefix}.pos_embed".lstrip(".")
        if hasattr(layer, "pos_embed_mode") and name in state:
            resized = _resized(state[name], tuple(layer.pos_embed.shape), layer.pos_embed_mode)
            if resized is not None:
                result[name] = resized
                sides = [math.isqrt(value.shape[1] - 1) for value in (state[name], resized)]
                done.append(f"{name} resized from a grid of {sides[0]} x {sides[0]} to {sides[1]} x {sides[1]}")
    return result, done


def _resized(positions: np.ndarray, shape: tuple[int, ...], mode: Mode) -> Optional[np.ndarray]:
    """[1, 1 + in^2, D] -> [1, 1 + out^2, D], which is ``shape``; None if that is not all that differs."""
    found = tuple(positions.shape)
    if len(found) != 3 or found == shape or (found[0], found[2]) != (shape[0], shape[2]) or positions.dtype.kind != "f":
        return None
    in_size, out_size = math.isqrt(max(found[1] - 1, 0)), math.isqrt(shape[1] - 1)
    if in_size < 1 or in_size**2 + 1 != found[1]:
        return None
    matrix = resize_matrix(mode, in_size, out_size, np.float32)
    grid = positions[0, 1:].astype(np.float64).reshape(in_size, in_size, -1)
    grid = np.einsum("ri,cj,ijd->rcd", matrix, matrix, grid).reshape(1, out_size**2, -1)
    return np.concatenate([positions[:, :1], grid.astype(positions.dtype)], axis=1)


def _antialias_matrix(in_size: int, out_size: int, dtype: type) -> np.ndarray:
    """Antialiased bicubic interpolation (A = -0.5, as Pillow's).

    The filter widens when the axis shrinks, and is cut off and normalised again at the borders.
    """
    scale = dtype(in_size / out_size)
    center = (scale * (np.arange(out_size) + 0.5)).astype(dtype).astype(np.float64)
    distance = np.abs(np.arange(in_size) + 0.5 - center[:, None]) / max(scale, 1.0)
    matrix = cubic_weights(distance, -0.5)
    return matrix / matrix.sum(1, keepdims=True)


def symbolic_resize_matrices(mode: Mode, in_size: int, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """:func:`resize_matrix` (float32 coordinates) of two sizes that are not known before the program runs. float64."""
    rows, columns = paddle.full([1], rows, "int64"), paddle.full([1], columns, "int64")
    same = paddle.logical_and(rows == in_size, columns == in_size).astype("float64")
    matrices = []
    for size in (rows, columns):
        # At a scale of 1 the matrix is exactly the identity: an image of the trained size is not resized.
        scale = same + (1.0 - same) * resize_scale(mode, in_size, size.astype("float64"))
        matrices.append((_symbolic_antialias if mode == "antialias" else _symbolic_bicubic)(in_size, size, scale))
    return matrices


def _symbolic_bicubic(in_size: int, out_size: Tensor, scale: Tensor) -> Tensor:
    """out_size, scale: [1] -> [out, in]"""
    inverse = (1.0 / scale).astype("float32").astype("float64")
    center = (inverse * (_count(out_size) + 0.5) - 0.5).astype("float32").astype("float64")
    floor, sources = paddle.floor(center), _count(in_size)
    matrix = 0.0
    for offset in (-1.0, 0.0, 1.0, 2.0):
        index = floor + offset
        # Not abs(): Paddle 3.3 optimises this one away when it runs the exported program.
        distance = center - index if offset < 1.0 else index - center
        weight = cubic_parts(distance, -0.75)[0 if offset in (0.0, 1.0) else 1]
        hits = index.clip(0.0, in_size - 1.0).unsqueeze(1) == sources
        matrix = matrix + weight.unsqueeze(1) * hits.astype("float64")
    return matrix


def _symbolic_antialias(in_size: int, out_size: Tensor, scale: Tensor) -> Tensor:
    """out_size, scale: [1] -> [out, in]"""
    inverse = (1.0 / scale).astype("float32").astype("float64")
    center = (inverse * (_count(out_size) + 0.5)).astype("float32").astype("float64")
    offset = _count(in_size) + 0.5 - center.unsqueeze(1)
    distance = paddle.maximum(offset, -offset) / inverse.clip(min=1.0)
    near, far = cubic_parts(distance, -0.5)
    is_near, is_far = (distance <= 1.0).astype("float64"), (distance < 2.0).astype("float64")
    matrix = near * is_near + far * (is_far - is_near)
    return matrix / matrix.sum(1, keepdim=True)


def _count(size: Union[int, Tensor]) -> Tensor:
    """0, 1 ... size-1 in float64"""
    return paddle.arange(size, dtype="int64").astype("float64")
