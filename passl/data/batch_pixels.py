"""The operations of `MultiCrop` on many images at once, with Paddle, on the device where they are.

Importing this module imports Paddle. The results are those of `passl.data.transforms` without the rounding to 8 bits in
between. Everything is a few large operations: matrix products where possible, because broadcasting is slow on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor

from passl.data import photometric
from passl.data.banded import Band, box_blur_band, gaussian_band, resize_band
from passl.data.views import ViewParameters

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)


def render(images: Tensor, views: Sequence[ViewParameters], size: tuple[int, int], is_picture: bool) -> Tensor:
    """The ``views`` [V * B], view by view, of ``images`` [B, C, H, W] float32: [V * B, C, height, width].

    Args:
        is_picture: three colours in 0..1; otherwise as `passl.data.backends.raw`.
    """
    pixels = _cropped(images, views, size, is_picture)
    pixels, order = _colored(pixels, views, is_picture)
    pixels, places = _blurred(pixels, [views[index] for index in order], is_picture)
    # Back from groups to the order of the views.
    pixels = paddle.index_select(pixels, on_device(places[np.argsort(order)], pixels))
    return _solarized(pixels, views) if is_picture else pixels


def _cropped(images: Tensor, views: Sequence[ViewParameters], size: tuple[int, int], is_picture: bool) -> Tensor:
    batch, channels, height, width = images.shape
    number = len(views) // batch
    boxes = np.array([view.box for view in views])
    flips = np.array([view.flip for view in views])
    across = resize_band(boxes[:, 1], boxes[:, 3], flips, width, size[1])
    down = resize_band(boxes[:, 0], boxes[:, 2], np.zeros_like(flips), height, size[0])
    columns = _dense(across, width, images).reshape([number, batch, size[1], width])
    rows = _dense(down, height, images).reshape([number, batch, 1, size[0], height])
    # The images are not copied for each view: the product repeats them.
    pixels = paddle.matmul(images.reshape([1, batch, channels * height, width]), columns, transpose_y=True)
    # Values beyond black and white are cut off in between, so the order shows: across first, as Pillow.
    pixels = pixels.clip(0.0, 1.0) if is_picture else pixels
    pixels = paddle.matmul(rows, pixels.reshape([number, batch, channels, height, size[1]]))
    pixels = pixels.clip(0.0, 1.0) if is_picture else pixels
    return pixels.reshape([len(views), channels, *size])


def _dense(band: Band, length: int, like: Tensor) -> Tensor:
    """[V, n, length] of a band, on the device of ``like``."""
    first, weights = band
    views, rows, taps = weights.shape
    starts = first + np.arange(views * rows).reshape(views, rows) * length
    places = on_device(starts.reshape(-1, 1) + np.arange(taps), like)
    values = on_device(weights, like)
    zeros = on_device(np.zeros(1, np.float32), like).expand([views * rows * length])
    return paddle.scatter(zeros, places.reshape([-1]), values.reshape([-1])).reshape([views, rows, length])


def on_device(array: np.ndarray, like: Tensor) -> Tensor:
    """``array`` where ``like`` is."""
    tensor = paddle.empty(array.shape, array.dtype.name)
    if str(tensor.place) != str(like.place):
        return paddle.to_tensor(array, place=like.place)
    # As paddle.to_tensor, which in Paddle 3.3 leaves 100 bytes behind at each call: 5 kB in each batch.
    tensor.set_value(array)
    return tensor


# --- colours ---


def _colored(pixels: Tensor, views: Sequence[ViewParameters], is_picture: bool) -> tuple[Tensor, list[int]]:
    """Each view with its own changes of colour, in its own order; the views come grouped: and which is where."""
    channels = pixels.shape[1]
    steps = [_steps(view, channels, is_picture) for view in views]
    if not any(steps):
        return pixels, list(range(len(views)))
    groups: dict[int, list[int]] = {}
    for index, names in enumerate([name for name, _ in those] for those in steps):
        groups.setdefault(names.index("hue") if "hue" in names else -1, []).append(index)
    parts = []
    for hue_place, indices in groups.items():
        part = paddle.index_select(pixels, on_device(np.array(indices), pixels))
        parts.append(_changed(part, [steps[index] for index in indices], hue_place, is_picture))
    return paddle.concat(parts), [index for indices in groups.values() for index in indices]


def _steps(view: ViewParameters, channels: int, is_picture: bool) -> list[tuple[str, float]]:
    if not is_picture:
        return [step for step in view.jitter if photometric.is_kept(step[0], channels)]
    # Grey is a picture without saturation.
    return [*view.jitter, *([("saturation", 0.0)] if view.gray else [])]


def _changed(pixels: Tensor, steps: list[list[tuple[str, float]]], hue_place: int, is_picture: bool) -> Tensor:
    """All views have the hue at the same place, if any: between those steps that are sums of products."""
    for place in range(max(map(len, steps))):
        here = [those[place] if place < len(those) else ("", 1.0) for those in steps]
        if place == hue_place:
            pixels = turned_hue(pixels, np.array([factor for _, factor in here]))
        else:
            pixels = _blended(pixels, here)
            pixels = pixels.clip(0.0, 1.0) if is_picture else pixels
    return pixels


def _blended(pixels: Tensor, steps: list[tuple[str, float]]) -> Tensor:
    """Brightness: factor * pixels. To it, saturation adds (1 - factor) * grey, contrast (1 - factor) * its mean."""
    views, channels, height, width = pixels.shape
    gray = _GRAY if channels == 3 else np.ones(1, np.float32)
    mixing = np.empty((views, channels, channels), np.float32)
    shift = np.zeros((views, 1, 1), np.float32)
    for matrix, means, (name, factor) in zip(mixing, shift, steps):
        matrix[...] = np.eye(channels) * factor
        if name == "saturation":
            matrix += (1.0 - factor) * gray
        elif name == "contrast":
            means[...] = 1.0 - factor
    flat = pixels.reshape([views, channels, -1])
    result = paddle.matmul(on_device(mixing, pixels), flat)
    if shift.any():
        mean = paddle.matmul(on_device(gray[None], pixels), flat.mean(-1, keepdim=True))
        result = result + mean * on_device(shift, pixels)
    return result.reshape([views, channels, height, width])


def turned_hue(pixels: Tensor, factors: np.ndarray) -> Tensor:
    """[V, 3, h, w] with the hue turned by ``factors`` [V] (-0.5..0.5) of the circle.

    As `passl.data.backends.pixels.adjust_hue`: a colour is its largest channel less a share of the chroma.
    """
    # As the official code, which turns by whole steps of 255, cut off.
    turns = on_device((np.trunc(factors * 255) * (6 / 255)).astype(np.float32).reshape(-1, 1, 1, 1), pixels)
    red, green, blue = paddle.split(pixels, 3, axis=1)
    value = paddle.maximum(paddle.maximum(red, green), blue)
    chroma = value - paddle.minimum(paddle.minimum(red, green), blue)
    per_chroma = 1.0 / chroma.clip(min=1e-6)
    is_red = (red == value).astype(pixels.dtype)
    is_green = (green == value).astype(pixels.dtype) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    # In sixths of the circle; the largest channel's own place and how much the other two differ.
    hue = (is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)) * per_chroma
    hue = hue + 2.0 * is_green + 4.0 * is_blue + turns
    changed = []
    for own in (0.0, 2.0, 4.0):
        distance = hue - (own - 3.0)
        distance = (distance - 6.0 * paddle.floor(distance / 6.0) - 3.0).abs()
        changed.append(value - chroma * (distance - 1.0).clip(0.0, 1.0))
    return paddle.concat(changed, axis=1)


# --- what comes after the colours ---


def _blurred(pixels: Tensor, views: Sequence[ViewParameters], is_picture: bool) -> tuple[Tensor, np.ndarray]:
    """``pixels`` [V, C, h, w], followed by those that are blurred; and where the finished ones are, int64 [V]."""
    places = np.arange(len(views))
    chosen = np.array([index for index in places if views[index].blur_radius is not None])
    if not len(chosen):
        return pixels, places
    places[chosen] = len(views) + np.arange(len(chosen))
    radii = [views[index].blur_radius for index in chosen]
    part = paddle.index_select(pixels, on_device(chosen, pixels))
    height, width = pixels.shape[2:]
    band = box_blur_band if is_picture else gaussian_band
    rows, columns = (_dense(band(radii, size), size, pixels).unsqueeze(1) for size in (height, width))
    part = paddle.matmul(paddle.matmul(rows, part), columns, transpose_y=True)
    return paddle.concat([pixels, part]), places


def _solarized(pixels: Tensor, views: Sequence[ViewParameters]) -> Tensor:
    """Values above a half inverted, where a view asks for it."""
    chosen = np.array([view.solarize for view in views], np.float32)
    if not chosen.any():
        return pixels
    excess = (2.0 * pixels - 1.0).clip(min=0.0)
    return pixels - excess * on_device(chosen.reshape(-1, 1, 1, 1), pixels)
