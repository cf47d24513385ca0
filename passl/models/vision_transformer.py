"""Vision transformer (Dosovitskiy et al. 2021) as DINO uses it: no classifier, any rectangular input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, Optional

import numpy as np
import paddle
from paddle import Tensor, nn

from passl.models import functional, packs
from passl.models.blocks import Block, PatchEmbed, are_unchanged
from passl.models.layers import INIT_STD, NORMAL_002, ZERO, LayerNorm, check_positive
from passl.models.positions import MODES, Mode, resize_matrix, symbolic_resize_matrices
from passl.registry import BACKBONES


class TokenTransformer(nn.Layer):
    """[CLS], position embeddings, blocks and the final norm over a grid of tokens, which a subclass makes in `embed`.

    Tokens are in this order: [CLS], registers, the grid row by row; T = num_prefix_tokens + N of them. Where a mask
    [B, T] is 0, nothing attends to that token.
    """

    patch_size: int  # Side of a token's square, in pixels of the input.

    def embed(self, images: Tensor) -> Tensor:
        """The tokens of the grid without their positions: [B, C, H, W] -> [B, N, D]."""
        raise NotImplementedError

    def _build(
        self,
        block: Callable[..., Block],
        embed_dim: int,
        depth: int,
        drop_path_rate: float,
        epsilon: float,
        grid_size: int,
        pos_embed_mode: str,
        num_register_tokens: int = 0,
        drop_path_uniform: bool = False,
    ) -> None:
        """Everything behind the embedding. Not the constructor: in the official order of names that comes later."""
        check_positive(depth=depth, grid_size=grid_size)
        if pos_embed_mode not in MODES:
            raise ValueError(f"pos_embed_mode ({pos_embed_mode!r}) must be one of {', '.join(MODES)}")
        if num_register_tokens < 0:
            raise ValueError(f"num_register_tokens ({num_register_tokens}) must be at least 0")
        self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 + num_register_tokens
        self.pos_embed_mode = pos_embed_mode
        self._grid_side = grid_size
        self.cls_token = self.create_parameter([1, 1, embed_dim], default_initializer=NORMAL_002)
        self.pos_embed = self.create_parameter([1, 1 + grid_size**2, embed_dim], default_initializer=NORMAL_002)
        self.register_tokens = None
        if num_register_tokens:
            shape = [1, num_register_tokens, embed_dim]
            # Not zeros: equal tokens would stay equal.
            self.register_tokens = self.create_parameter(shape, default_initializer=nn.initializer.Normal(std=1e-6))
        first_rate = drop_path_rate if drop_path_uniform else 0.0
        rates = np.linspace(first_rate, drop_path_rate, depth).tolist()
        self.blocks = nn.LayerList([block(drop_path_rate=rate) for rate in rates])
        self.norm = LayerNorm(embed_dim, epsilon=epsilon)

    def forward(self, images: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The normalised [CLS] token: [B, C, H, W] -> [B, D]. H and W must be multiples of the patch size."""
        x = self.prepare_tokens(images)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x[:, 0])

    def forward_crops(
        self,
        crops: Sequence[Tensor],
        masks: Optional[Sequence[Optional[Tensor]]] = None,
        packed: Optional[bool] = None,
    ) -> list[Tensor]:
        """All normalised tokens of batches of crops of different sizes: each [B_i, C, H_i, W_i] -> [B_i, T_i, D].

        masks: for each batch None, or bool [B_i, N_i]: where it is true the mask token stands in for the patch.
        packed: see `_through_blocks`.
        """
        masks = [None] * len(crops) if masks is None else masks
        if len(masks) != len(crops):
            raise ValueError(
                f"masks ({len(masks)}) must be as many as crops ({len(crops)}), None where nothing is hidden"
            )
        tokens = [self.prepare_tokens(crop, mask) for crop, mask in zip(crops, masks)]
        runs = packs.runs_of_equal_sizes(tokens)
        outputs = self._through_blocks([packs.concat(run) for run in runs], packed)
        return [part for x, run in zip(outputs, runs) for part in packs.split(x, [len(batch) for batch in run])]

    def cls_of_crops(self, crops: Sequence[Tensor], packed: Optional[bool] = None) -> Tensor:
        """`forward` of batches of crops of different sizes, in one: each [B_i, C, H_i, W_i] -> [sum of B_i, D].

        packed: see `_through_blocks`.
        """
        tokens = [self.prepare_tokens(packs.concat(run)) for run in packs.runs_of_equal_sizes(crops)]
        return packs.concat([x.squeeze(1) for x in self._through_blocks(tokens, packed, cls_only=True)])

    def _through_blocks(
        self, batches: Sequence[Tensor], packed: Optional[bool], cls_only: bool = False
    ) -> list[Tensor]:
        """Tokens of batches of different sizes [B_i, T_i, D] behind the blocks and the final norm.

        packed: whether the blocks run once for all, over a pack, not once for each batch. None: on a GPU, unless there
        are hooks in the blocks, which see batches, or blocks of somebody's own.
        cls_only: the last block computes the first token of each sequence alone: [B_i, 1, D].
        """
        if packed is None:
            on_gpu = bool(batches) and paddle.in_dynamic_mode() and batches[0].place.is_gpu_place()
            packed = on_gpu and are_unchanged(self.blocks)
        if not packed or len(batches) < 2:
            return [self.norm(self._last_tokens(x, None, cls_only)) for x in batches]
        x, sizes = packs.pack(batches)
        x = self.norm(self._last_tokens(x, sizes, cls_only))
        return packs.unpack(x, tuple((sequences, 1) for sequences, _ in sizes) if cls_only else sizes)

    def _last_tokens(self, x: Tensor, sizes: Optional[packs.Sizes], cls_only: bool) -> Tensor:
        if sizes is None and not cls_only:
            for block in self.blocks:
                x = block(x)
            return x
        for block in self.blocks[:-1]:
            x = block(x, None, sizes)
        return self.blocks[-1](x, None, sizes, cls_only)

    def get_intermediate_layers(self, images: Tensor, n: int = 1, mask: Optional[Tensor] = None) -> list[Tensor]:
        """The normalised tokens [B, 1+N, D] after each of the last n blocks, the earliest first; without registers."""
        depth = len(self.blocks)
        if not 1 <= n <= depth:
            raise ValueError(f"n ({n}) must be between 1 and the number of blocks ({depth})")
        x = self.prepare_tokens(images)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x, mask)
            if index >= depth - n:
                outputs.append(self.norm(self._without_registers(x)))
        return outputs

    def get_last_selfattention(self, images: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The attention weights of the last block between all tokens: [B, C, H, W] -> [B, heads, T, T]."""
        x = self.prepare_tokens(images)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x), mask)

    def prepare_tokens(self, images: Tensor, hidden: Optional[Tensor] = None) -> Tensor:
        """All tokens, [CLS] and those of the grid with their position embeddings: [B, C, H, W] -> [B, T, D].

        hidden: bool [B, N], the patches for which the mask token stands.
        """
        patches = self.embed(images)
        if hidden is not None:
            patches = self._hide(patches, hidden)
        cls_token = self.cls_token.expand([images.shape[0], -1, -1])
        x = paddle.concat([cls_token, patches], axis=1) + self.interpolate_pos_encoding(*images.shape[-2:])
        if self.register_tokens is None:
            return x
        return paddle.concat([x[:, :1], self.register_tokens.expand([images.shape[0], -1, -1]), x[:, 1:]], axis=1)

    def _hide(self, patches: Tensor, hidden: Tensor) -> Tensor:
        if getattr(self, "mask_token", None) is None:
            raise ValueError(f"{type(self).__name__} has no mask token to stand for hidden patches: mask_token: true")
        if hidden.shape != patches.shape[:2]:
            raise ValueError(f"masks ({hidden.shape}) must be [images, patches], here {patches.shape[:2]}")
        token = self.mask_token.astype(patches.dtype).unsqueeze(0).expand_as(patches)
        return paddle.where(hidden.unsqueeze(-1).expand_as(patches), token, patches)

    def _without_registers(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, 1+N, D]"""
        if self.register_tokens is None:
            return x
        return paddle.concat([x[:, :1], x[:, self.num_prefix_tokens :]], axis=1)

    @paddle.jit.not_to_static  # its branches are on Python's ints, also in a program
    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Position embeddings for an image of height x width pixels: [1, 1+N, D].

        In a program that is exported for any size these two are tensors.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        side = self._grid_side
        if isinstance(rows, int) and rows == columns == side:
            return self.pos_embed
        row_weights, column_weights = self._resize_matrices(rows, columns)
        grid = self.pos_embed[0, 1:].reshape([side, side * self.embed_dim])
        grid = paddle.matmul(row_weights, grid).reshape([-1, side, self.embed_dim])
        grid = paddle.matmul(column_weights, grid).reshape([1, -1, self.embed_dim])
        return paddle.concat([self.pos_embed[:, :1], grid], axis=1)

    def _resize_matrices(self, rows: int, columns: int) -> list[Tensor]:
        """[rows, side] and [columns, side]"""
        mode, side, dtype = self.pos_embed_mode, self._grid_side, self.pos_embed.dtype
        if not (isinstance(rows, int) and isinstance(columns, int)):
            return [matrix.astype(dtype) for matrix in symbolic_resize_matrices(mode, side, rows, columns)]
        precision = np.float64 if dtype == paddle.float64 else np.float32
        matrices = [resize_matrix(mode, side, size, precision) for size in (rows, columns)]
        return [functional.tensor_of(matrix).astype(dtype) for matrix in matrices]


@BACKBONES.register()
class VisionTransformer(TokenTransformer):
    """Vision transformer with the official names of DINO (Caron et al. 2021) and DINOv2, so that weight files fit.

    pos_embed_mode: how position embeddings are resized to another grid, all bicubic. "scale" is the official DINO: the
    scale factor (side + 0.1)/sqrt(N) used as it stands; "size" resizes to the exact size; "antialias" does so with
    antialiasing, as DINOv2 with registers.
    init_std: standard deviation of the first weights in the blocks. The official 0.02 suits widths of several
    hundred; narrower networks let more of the image through from the start, and learn sooner, with 1/sqrt(embed_dim).
    num_register_tokens: learned tokens between [CLS] and the patches, without positions (Darcet et al. 2023).
    layer_scale, ffn: see Block.
    mask_token: whether there is a token to stand for hidden patches, which DINOv2's files have. Nothing here uses it,
    so it is frozen; a method that hides patches has to make it trainable.
    drop_path_rate: stochastic depth of the last block; the others' rates rise to it from 0.
    drop_path_uniform: all blocks have the rate of the last.
    drop_path_subset: the samples that are dropped are not computed, see SubsetDropPath; the official way of DINOv2.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        epsilon: float = 1e-6,
        pos_embed_mode: Mode = "scale",
        init_std: float = INIT_STD,
        num_register_tokens: int = 0,
        layer_scale: Optional[float] = None,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        mask_token: bool = False,
        drop_path_uniform: bool = False,
        drop_path_subset: bool = False,
    ) -> None:
        super().__init__()
        check_positive(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads)
        if img_size < patch_size:
            raise ValueError(f"img_size ({img_size}) must be at least patch_size ({patch_size})")
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        block = functools.partial(
            Block,
            embed_dim,
            num_heads,
            mlp_ratio,
            qkv_bias,
            epsilon=epsilon,
            init_std=init_std,
            layer_scale=layer_scale,
            ffn=ffn,
            drop_path_subset=drop_path_subset,
        )
        self._build(
            block,
            embed_dim,
            depth,
            drop_path_rate,
            epsilon,
            img_size // patch_size,
            pos_embed_mode,
            num_register_tokens,
            drop_path_uniform,
        )
        self.mask_token = None
        if mask_token:
            frozen = paddle.ParamAttr(trainable=False)
            self.mask_token = self.create_parameter([1, embed_dim], attr=frozen, default_initializer=ZERO)

    def embed(self, images: Tensor) -> Tensor:
        return self.patch_embed(images)


@BACKBONES.register()
def vit_tiny(
    patch_size: int = 16,
    img_size: int = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    pos_embed_mode: Mode = "scale",
) -> VisionTransformer:
    """ViT-Ti: 192 wide, 12 blocks, 3 heads, 5.5 M parameters."""
    return VisionTransformer(
        img_size, patch_size, in_chans, 192, 12, 3, drop_path_rate=drop_path_rate, pos_embed_mode=pos_embed_mode
    )


@BACKBONES.register()
def vit_small(
    patch_size: int = 16,
    img_size: int = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    pos_embed_mode: Mode = "scale",
) -> VisionTransformer:
    """ViT-S: 384 wide, 12 blocks, 6 heads, 21.7 M parameters."""
    return VisionTransformer(
        img_size, patch_size, in_chans, 384, 12, 6, drop_path_rate=drop_path_rate, pos_embed_mode=pos_embed_mode
    )


@BACKBONES.register()
def vit_base(
    patch_size: int = 16,
    img_size: int = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    pos_embed_mode: Mode = "scale",
) -> VisionTransformer:
    """ViT-B: 768 wide, 12 blocks, 12 heads, 85.8 M parameters."""
    return VisionTransformer(
        img_size, patch_size, in_chans, 768, 12, 12, drop_path_rate=drop_path_rate, pos_embed_mode=pos_embed_mode
    )


@BACKBONES.register()
def vit_large(
    patch_size: int = 16,
    img_size: int = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    pos_embed_mode: Mode = "scale",
) -> VisionTransformer:
    """ViT-L: 1024 wide, 24 blocks, 16 heads, 303.3 M parameters."""
    return VisionTransformer(
        img_size, patch_size, in_chans, 1024, 24, 16, drop_path_rate=drop_path_rate, pos_embed_mode=pos_embed_mode
    )
