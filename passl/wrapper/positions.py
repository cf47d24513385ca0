"""Vision transformers of others, whose position embeddings are parameters of one image size, at other sizes.

While such a model runs, its embeddings are hidden by resized ones, and what it remembers of its image size by the size
at hand. Afterwards everything is as before: parameters, state dict and gradients are those of the model.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import paddle
from paddle import Tensor, nn

from passl.models import functional
from passl.models.positions import resize_matrix

Pair = tuple[int, int]

_POSITIONS = re.compile(r"(^|_)pos(ition(al)?)?_?(emb(ed(ding)?)?|encoding)s?$")
_TOKENS = re.compile(r"(^|_)(cls|class|dist(illation)?|reg|register|global)_?(tokens?|embedding)$")
_MOST_TOKENS = 17  # beside the patches: [CLS], distillation and 15 registers
# What models remember of their images: height and width, the same in patches, patches, and tokens.
_SIZES = ("img_size", "image_size", "input_size", "input_resolution")
_NEVER_ONE_NUMBER = ("input_size", "input_resolution")  # which are other things than images' sides, too
_GRIDS = ("grid_size", "patches_resolution", "patch_grid", "feature_size")
_PATCHES = ("num_patches",)
_SEQUENCES = ("seq_length", "seq_len", "num_positions")


@dataclass(frozen=True)
class Embedding:
    """Position embeddings [1, T, D] or [T, D]: of `layer` (dotted), of `tokens` first and then of a grid of patches."""

    layer: str
    name: str
    tokens: int
    grid: Pair


@dataclass(frozen=True)
class FixedPositions:
    """What in a model is made for images of `own_size` (height, width); plain data, for the model and its copies.

    Attributes:
        patch: pixels of a patch, (height, width).
        settings: (layer, attribute) that tell the size.
    """

    own_size: Pair
    patch: Pair
    embeddings: tuple[Embedding, ...]
    settings: tuple[tuple[str, str], ...]

    @property
    def larger_size(self) -> Pair:
        """One patch more than `own_size` in each direction."""
        return self.own_size[0] + self.patch[0], self.own_size[1] + self.patch[1]

    @contextlib.contextmanager
    def at(self, model: nn.Layer, size: Pair) -> Iterator[None]:
        """Inside, `model` takes images of `size` (height, width). The resized embeddings lead gradients to its own.

        What runs later than that, as recomputation does in the backward pass, sees the model as it is.

        Raises:
            ValueError: the images are smaller than a patch.
        """
        size = (int(size[0]), int(size[1]))
        if size == self.own_size:
            yield
            return
        grid = (size[0] // self.patch[0], size[1] // self.patch[1])
        if 0 in grid:
            raise ValueError(
                f"crops of {size[0]} x {size[1]} px are smaller than the patches of {type(model).__name__}, "
                f"{self.patch[0]} x {self.patch[1]}: set local_crop_size to a multiple of them"
            )
        with contextlib.ExitStack() as stack:
            for place in self.embeddings:
                layer = _sublayer(model, place.layer)
                # Python looks among an object's own attributes first, and a Layer keeps its parameters elsewhere.
                stack.enter_context(_hidden(layer, place.name, _resized(getattr(layer, place.name), place, grid)))
            for path, name in self.settings:
                layer = _sublayer(model, path)
                value = self._setting(name, vars(layer)[name], size, grid)
                stack.enter_context(_hidden(layer, name, value))
            yield

    def _setting(self, name: str, value: Any, size: Pair, grid: Pair) -> Any:
        if name in _SIZES:
            return _like(value, size)
        if name in _GRIDS:
            return _like(value, grid)
        own = self.embeddings[0].grid
        return value + grid[0] * grid[1] - own[0] * own[1]


def adapt_positions(model: nn.Layer, image_size: Pair, own_size: Pair) -> contextlib.AbstractContextManager[None]:
    """Inside, ``model``, made for images of ``own_size``, takes those of ``image_size``. See `FixedPositions.at`.

    Raises:
        ValueError: it has no position embeddings of this size; the message says what to set.
    """
    found = fixed_positions(model, own_size)
    if found is None:
        raise ValueError(why_not(model, own_size))
    return found.at(model, image_size)


def fixed_positions(model: nn.Layer, own_size: Pair) -> Optional[FixedPositions]:
    """What in ``model`` is made for images of ``own_size``; None if there are no position embeddings that fit it."""
    own_size = (int(own_size[0]), int(own_size[1]))
    found: list[Embedding] = []
    patch = None
    for path, name, value in _position_embeddings(model):
        guess = _grid_of(model, value.shape[-2], own_size)
        if guess is None or patch not in (None, guess[2]):
            continue
        tokens, grid, patch = guess
        found.append(Embedding(path, name, tokens, grid))
    if not found:
        return None
    return FixedPositions(own_size, patch, tuple(found), tuple(_settings(model, own_size, found[0])))


def why_not(model: nn.Layer, own_size: Pair) -> str:
    """What to set where position embeddings cannot be resized."""
    names = [name for name, layer in model.named_sublayers() if _is_table_of_positions(name, layer)]
    if names:
        reason = f"its positions are looked up in a table ({names[0]})"
    else:
        names = [f"{path}.{name}".lstrip(".") for path, name, _ in _position_embeddings(model)]
        reason = f"{names[0]} is not of a grid of patches" if names else "it has no parameter called pos_embed or alike"
    size = f"({own_size[0]}, {own_size[1]})"
    return (
        f"the position embeddings of {type(model).__name__} cannot be resized for other crops: {reason}. Set "
        f"local_crop_size={size}, which is the model's own size, or local_crops_number=0"
    )


def own_size_of(model: nn.Layer) -> Optional[Pair]:
    """The image size that ``model`` tells: by an attribute, or by its embeddings and the stride of its patches."""
    for _, layer in model.named_sublayers(include_self=True):
        for name in _SIZES:
            value = vars(layer).get(name)
            size = _pair(value)
            if size is not None and not (name in _NEVER_ONE_NUMBER and isinstance(value, int)):
                return size
    tokens = _tokens_beside(model)
    for _, _, value in _position_embeddings(model):
        for stride in _strides(model):
            for number in sorted(tokens, reverse=True):
                side = math.isqrt(max(value.shape[-2] - number, 0))
                if side > 1 and side**2 + number == value.shape[-2]:
                    return side * stride[0], side * stride[1]
    return None


# --- finding ---


def _position_embeddings(model: nn.Layer) -> Iterator[tuple[str, str, Tensor]]:
    """Layer, name and value of parameters and buffers [1, T, D] or [T, D] that are called so."""
    for path, layer in model.named_sublayers(include_self=True):
        for name, value in (*layer._parameters.items(), *layer._buffers.items()):
            if value is None or not _POSITIONS.search(name) or not value.is_floating_point():
                continue
            if value.ndim == 2 or (value.ndim == 3 and value.shape[0] == 1):
                yield path, name, value


def _is_table_of_positions(path: str, layer: nn.Layer) -> bool:
    return isinstance(layer, nn.Embedding) and bool(_POSITIONS.search(path.rpartition(".")[2]))


def _grid_of(model: nn.Layer, length: int, own_size: Pair) -> Optional[tuple[int, Pair, Pair]]:
    """Of ``length`` embeddings: those of other tokens, the grid of the rest, the pixels of a patch; the likeliest."""
    height, width = own_size
    beside = _tokens_beside(model)
    strides = set(_strides(model))
    guesses = []
    # Without a convolution that makes patches, they are squares that fill the image.
    squares = {(side, side) for side in range(1, min(own_size) + 1) if height % side == width % side == 0}
    for patch in strides | squares:
        grid = (height // patch[0], width // patch[1])
        tokens = length - grid[0] * grid[1]
        if 0 not in grid and 0 <= tokens <= _MOST_TOKENS:
            guesses.append((tokens not in beside, patch not in strides, tokens, grid, patch))
    return min(guesses)[2:] if guesses else None


def _tokens_beside(model: nn.Layer) -> set[int]:
    """How many tokens may have an embedding beside the patches: some of the parameters that are called so, or none."""
    sums = {0}
    for name, value in model.named_parameters():
        if _TOKENS.search(name.rpartition(".")[2]):
            number = value.shape[-2] if value.ndim > 1 else 1
            sums |= {others + number for others in sums}
    return sums


def _strides(model: nn.Layer) -> list[Pair]:
    """Of the convolutions whose windows lie side by side, as those that make patches."""
    found = []
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, nn.Conv2D):
            stride, kernel = _pair(layer._stride), _pair(layer._kernel_size)
            if stride is not None and stride == kernel and stride != (1, 1):
                found.append(stride)
    return found


def _settings(model: nn.Layer, own_size: Pair, embedding: Embedding) -> Iterator[tuple[str, str]]:
    patches = embedding.grid[0] * embedding.grid[1]
    own = {
        **dict.fromkeys(_SIZES, own_size),
        **dict.fromkeys(_GRIDS, embedding.grid),
        **dict.fromkeys(_PATCHES, patches),
        **dict.fromkeys(_SEQUENCES, patches + embedding.tokens),
    }
    for path, layer in model.named_sublayers(include_self=True):
        for name, value in vars(layer).items():
            if name not in own or not isinstance(value, (int, tuple, list)):
                continue
            is_other = name in _NEVER_ONE_NUMBER and isinstance(value, int)
            if own[name] in (value, _pair(value)) and not is_other:
                yield path, name


def _pair(value: Any) -> Optional[Pair]:
    """(height, width) of a number or of two; None if ``value`` is neither."""
    sides = (value, value) if isinstance(value, (int, np.integer)) else value
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        return None
    if not all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides):
        return None
    return int(sides[0]), int(sides[1])


# --- using ---


def _sublayer(model: nn.Layer, path: str) -> nn.Layer:
    for name in filter(None, path.split(".")):
        model = getattr(model, name)
    return model


@contextlib.contextmanager
def _hidden(layer: nn.Layer, name: str, value: Any) -> Iterator[None]:
    """Inside, ``layer.name`` is ``value``, past what Paddle does with attributes."""
    attributes = vars(layer)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def _like(value: Any, size: Pair) -> Any:
    """``size`` in the form that ``value`` has."""
    if isinstance(value, (tuple, list)):
        return type(value)(size)
    # A model that keeps one number has no other to compare the second side with.
    return size[0]


def _resized(value: Tensor, place: Embedding, grid: Pair) -> Tensor:
    """[..., tokens + N, D] -> [..., tokens + rows * columns, D], bicubic."""
    rows, columns = (
        functional.tensor_of(resize_matrix("size", before, after, np.float32).astype(np.float32))
        for before, after in zip(place.grid, grid)
    )
    width = value.shape[-1]
    with paddle.amp.auto_cast(enable=False):
        flat = value.astype("float32").reshape([-1, width])
        patches = flat[place.tokens :].reshape([place.grid[0], place.grid[1] * width])
        patches = paddle.matmul(rows, patches).reshape([grid[0], place.grid[1], width])
        patches = paddle.matmul(columns, patches).reshape([-1, width])
        resized = paddle.concat([flat[: place.tokens], patches]).astype(value.dtype)
    return resized.reshape([*value.shape[:-2], -1, width])
