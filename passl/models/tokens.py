"""What a backbone knows of each patch: the attention of its [CLS] token, and features, of any block.

All functions are for backbones in eval mode, take images [B, C, H, W] whose sides the patch size divides, and give no
gradients. A backbone of your own has them too if it offers what the official code's networks do:
``feature_map(images) -> [B, D, h, w]`` for features, and ``get_last_selfattention(images) -> [B, heads, 1+N, 1+N]``
with a ``patch_size`` for attention.
"""

from __future__ import annotations

import paddle
from paddle import Tensor, nn

from passl.models import functional
from passl.models.vision_transformer import TokenTransformer
from passl.models.xcit import XCiT

_ROWS_AT_ONCE = 512  # of an attention matrix, in the rollout


@paddle.no_grad()
def cls_attention(backbone: nn.Layer, images: Tensor, layer: int = -1) -> Tensor:
    """The weights that [CLS] gives to the patches in each head of a block: [B, C, H, W] -> [B, heads, h, w].

    Softmax values: with those for [CLS] itself and for registers, which are left out, they sum to 1. Only this row
    of the attention matrix is computed.

    layer: number of the block, from 0; negative from the end. XCiT has [CLS] in its class-attention blocks only, so
    those are counted.

    Raises:
        ValueError: there is no such block, or the backbone has no [CLS] token that attends to patches.
    """
    if isinstance(backbone, TokenTransformer):
        index = _checked(layer, len(backbone.blocks), "blocks")
        block = backbone.blocks[index]
        x = backbone.prepare_tokens(images)
        for earlier in backbone.blocks[:index]:
            x = earlier(x)
        weights = block.attn.cls_weights(block.norm1(x))[:, :, backbone.num_prefix_tokens :]
        return weights.reshape([*weights.shape[:2], *_grid(backbone.patch_size, images)])
    if isinstance(backbone, XCiT):
        index = _checked(layer, len(backbone.cls_attn_blocks), "class-attention blocks")
        x, grid = backbone.patch_tokens(images)
        x = backbone.with_cls_token(x)
        for earlier in backbone.cls_attn_blocks[:index]:
            x = earlier(x)
        block = backbone.cls_attn_blocks[index]
        weights = block.attn.cls_weights(block.norm1(x))[:, :, 1:]
        return weights.reshape([*weights.shape[:2], *grid])
    if callable(getattr(backbone, "get_last_selfattention", None)) and hasattr(backbone, "patch_size"):
        _only_the_last(layer, backbone, "get_last_selfattention")
        rows, columns = _grid(backbone.patch_size, images)
        weights = backbone.get_last_selfattention(images)[:, :, 0, -rows * columns :]
        return weights.reshape([*weights.shape[:2], rows, columns])
    raise ValueError(
        f"{_name(backbone)} has no [CLS] token that attends to patches: look at how similar its patches are instead "
        "(passl-visualize attention with --similarity, or --point X,Y); or give a network of your own "
        "get_last_selfattention(images) -> [B, heads, 1+N, 1+N], and a patch_size"
    )


@paddle.no_grad()
def patch_features(backbone: nn.Layer, images: Tensor, layer: int = -1) -> Tensor:
    """The features of each patch behind a block: [B, C, H, W] -> [B, h, w, D].

    Those of a vision transformer are through its final norm, as its ``get_intermediate_layers`` gives them; those of
    XCiT as they come, since its final norm is for [CLS]. A convolutional network has its ``feature_map``.

    layer: number of the block, from 0; negative from the end. A ``feature_map`` is the last, -1.

    Raises:
        ValueError: there is no such block, or the backbone shows no patches.
    """
    if isinstance(backbone, TokenTransformer):
        index = _checked(layer, len(backbone.blocks), "blocks")
        x = backbone.prepare_tokens(images)
        for block in backbone.blocks[: index + 1]:
            x = block(x)
        x = backbone.norm(x[:, backbone.num_prefix_tokens :])
        return x.reshape([x.shape[0], *_grid(backbone.patch_size, images), x.shape[2]])
    if isinstance(backbone, XCiT):
        index = _checked(layer, len(backbone.blocks), "blocks")
        x, grid = backbone.patch_tokens(images, index + 1)
        return x.reshape([x.shape[0], *grid, x.shape[2]])
    if not callable(getattr(backbone, "feature_map", None)):
        raise ValueError(
            f"{_name(backbone)} shows no features of patches: give it a method feature_map(images) -> [B, D, h, w]"
        )
    _only_the_last(layer, backbone, "feature_map")
    features = backbone.feature_map(images)
    if features.ndim != 4 or features.shape[0] != images.shape[0]:
        raise ValueError(
            f"feature_map of {_name(backbone)} returned {list(features.shape)} for images {list(images.shape)}: "
            "expected [B, D, h, w]"
        )
    return features.transpose([0, 2, 3, 1])


@paddle.no_grad()
def attention_rollout(backbone: nn.Layer, images: Tensor, layer: int = -1) -> Tensor:
    """How much of each patch reaches [CLS] through all blocks up to ``layer``: [B, C, H, W] -> [B, h, w].

    Attention rollout (Abnar & Zuidema 2020): the [CLS] row of the product over the blocks of 0.5 A + 0.5 I, where A is
    the attention averaged over the heads. Its rows sum to 1, so there is nothing to normalise. No matrix is kept: the
    row goes backwards through the blocks, in slices.

    Raises:
        ValueError: there is no such block, or the backbone is no vision transformer.
    """
    if not isinstance(backbone, TokenTransformer):
        raise ValueError(f"{_name(backbone)} has no attention between all tokens to roll out: a vision transformer has")
    index = _checked(layer, len(backbone.blocks), "blocks")
    x = backbone.prepare_tokens(images)
    queries_and_keys = []
    for number, block in enumerate(backbone.blocks[: index + 1]):
        queries_and_keys.append(block.attn.query_key_value(block.norm1(x))[:2])
        if number < index:
            x = block(x)
    batch, tokens = x.shape[:2]
    row = paddle.concat([paddle.ones([batch, 1], x.dtype), paddle.zeros([batch, tokens - 1], x.dtype)], axis=1)
    while queries_and_keys:
        row = 0.5 * row + 0.5 * _through(row, *queries_and_keys.pop())
    return row[:, backbone.num_prefix_tokens :].reshape([batch, *_grid(backbone.patch_size, images)])


def _through(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """row [B, T] times the head-averaged attention of query and key [B, T, heads, d] -> [B, T]"""
    total = paddle.zeros_like(row)
    for start in range(0, row.shape[1], _ROWS_AT_ONCE):
        weights = functional.attention_weights(query[:, start : start + _ROWS_AT_ONCE], key)
        part = row[:, start : start + _ROWS_AT_ONCE]
        total += paddle.matmul(part.unsqueeze([1, 2]), weights).squeeze(2).mean(1)
    return total


def patch_size_of(backbone: nn.Layer) -> int:
    """Side of a patch in pixels, of which the sides of images must be multiples; 1 for a network of any size."""
    own = getattr(backbone, "patch_size", None)
    if own is None:
        own = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    return own if isinstance(own, int) else 1


def _grid(patch_size: int, images: Tensor) -> tuple[int, int]:
    return images.shape[2] // patch_size, images.shape[3] // patch_size


def _checked(layer: int, depth: int, what: str) -> int:
    """``layer`` counted from 0"""
    if not -depth <= layer < depth:
        raise ValueError(f"layer ({layer}) must be from {-depth} to {depth - 1}: there are {depth} {what}")
    return layer % depth


def _only_the_last(layer: int, backbone: nn.Layer, method: str) -> None:
    if layer != -1:
        raise ValueError(f"layer ({layer}) must be -1: {_name(backbone)} shows its last by {method} alone")


def _name(backbone: nn.Layer) -> str:
    return type(backbone).__name__
