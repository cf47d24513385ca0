"""Vision transformer (Dosovitskiy et al. 2021) as DINO uses it: no classifier, any rectangular input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Union

import numpy as np
import paddle
from paddle import Tensor, nn

from passl.models import functional
from passl.models.layers import (
    INIT_STD,
    NORMAL_002,
    DropPath,
    LayerNorm,
    Linear,
    Mlp,
    check_image_size,
    check_positive,
    torch_uniform,
)
from passl.registry import BACKBONES

Array = Union[np.ndarray, Tensor]


class Attention(nn.Layer):
    """Multi-head self-attention. x: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, init_std: float = INIT_STD) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, init_std=init_std)
        self.proj = Linear(dim, dim, init_std=init_std)

    def _query_key_value(self, x: Tensor) -> list[Tensor]:
        """[B, N, D] -> three of [B, N, heads, D/heads]"""
        shape = [-1, x.shape[1], self.num_heads, x.shape[2] // self.num_heads]
        return [part.reshape(shape) for part in self.qkv(x).split(3, axis=-1)]

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights alone: [B, N, D] -> [B, heads, N, N]."""
        query, key, _ = self._query_key_value(x)
        return functional.attention_weights(query, key)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(functional.attention(*self._query_key_value(x)).reshape(x.shape))


class Block(nn.Layer):
    """Pre-norm transformer block. x: [B, N, D] -> [B, N, D]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        epsilon: float = 1e-6,
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, epsilon=epsilon)
        self.attn = Attention(dim, num_heads, qkv_bias, init_std)
        self.norm2 = LayerNorm(dim, epsilon=epsilon)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), init_std)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Layer):
    """Cuts an image into patches and projects each. [B, C, H, W] -> [B, H/P * W/P, D], row by row."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # The official code leaves this one layer at PyTorch's default.
        uniform = torch_uniform(in_chans * patch_size * patch_size)
        self.proj = nn.Conv2D(
            in_chans, embed_dim, patch_size, stride=patch_size, weight_attr=uniform, bias_attr=uniform
        )

    def forward(self, images: Tensor) -> Tensor:
        check_image_size(*images.shape[-2:], self.patch_size)
        return functional.patch_embed(images, self.proj.weight, self.proj.bias)


@BACKBONES.register()
class VisionTransformer(nn.Layer):
    """Vision transformer with the official DINO names, so that its weight files fit (Caron et al. 2021).

    pos_embed_mode: how position embeddings are resized to another grid, bicubic in both cases. "scale" is the
    official DINO: the scale factor (side + 0.1)/sqrt(N) used as it stands; "size" resizes to the exact size.
    init_std: standard deviation of the first weights in the blocks. The official 0.02 suits widths of several
    hundred; narrower networks let more of the image through from the start, and learn sooner, with 1/sqrt(embed_dim).
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
        pos_embed_mode: Literal["scale", "size"] = "scale",
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        check_positive(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        if img_size < patch_size:
            raise ValueError(f"img_size ({img_size}) must be at least patch_size ({patch_size})")
        if pos_embed_mode not in ("scale", "size"):
            raise ValueError(f"pos_embed_mode ({pos_embed_mode!r}) must be 'scale' or 'size'")
        self.embed_dim = embed_dim
        self.pos_embed_mode = pos_embed_mode
        self._grid_side = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = self.create_parameter([1, 1, embed_dim], default_initializer=NORMAL_002)
        self.pos_embed = self.create_parameter([1, 1 + self._grid_side**2, embed_dim], default_initializer=NORMAL_002)
        self.blocks = nn.LayerList(
            [
                Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, epsilon, init_std)
                for rate in np.linspace(0.0, drop_path_rate, depth).tolist()
            ]
        )
        self.norm = LayerNorm(embed_dim, epsilon=epsilon)

    def forward(self, images: Tensor) -> Tensor:
        """The normalised [CLS] token: [B, C, H, W] -> [B, D]. H and W must be multiples of the patch size."""
        x = self.prepare_tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """The normalised tokens [B, 1+N, D] after each of the last n blocks, the earliest block first."""
        depth = len(self.blocks)
        if not 1 <= n <= depth:
            raise ValueError(f"n ({n}) must be between 1 and the number of blocks ({depth})")
        x = self.prepare_tokens(images)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= depth - n:
                outputs.append(self.norm(x))
        return outputs

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """The attention weights of the last block: [B, C, H, W] -> [B, heads, 1+N, 1+N]."""
        x = self.prepare_tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x))

    def prepare_tokens(self, images: Tensor) -> Tensor:
        """[CLS] and patch tokens with their position embeddings: [B, C, H, W] -> [B, 1+N, D]."""
        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand([images.shape[0], -1, -1])
        return paddle.concat([cls_token, patches], axis=1) + self.interpolate_pos_encoding(*images.shape[-2:])

    @paddle.jit.not_to_static  # its branches are on Python's ints, also in a program
    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Position embeddings for an image of height x width pixels: [1, 1+N, D].

        In a program that is exported for any size these two are tensors.
        """
        rows, columns = height // self.patch_embed.patch_size, width // self.patch_embed.patch_size
        side = self._grid_side
        if isinstance(rows, int) and isinstance(columns, int):
            if rows == columns == side:
                return self.pos_embed
            row_weights, column_weights = self._resize_matrix(rows), self._resize_matrix(columns)
        else:
            row_weights, column_weights = self._symbolic_resize_matrices(rows, columns)
        grid = self.pos_embed[0, 1:].reshape([side, side * self.embed_dim])
        grid = paddle.matmul(row_weights, grid).reshape([-1, side, self.embed_dim])
        grid = paddle.matmul(column_weights, grid).reshape([1, -1, self.embed_dim])
        return paddle.concat([self.pos_embed[:, :1], grid], axis=1)

    def _resize_matrix(self, size: int) -> Tensor:
        side = self._grid_side
        exact = self.pos_embed.dtype == paddle.float64
        matrix = _bicubic_matrix(side, size, self._resize_scale(size), np.float64 if exact else np.float32)
        return paddle.to_tensor(matrix).astype(self.pos_embed.dtype)

    def _symbolic_resize_matrices(self, rows: Tensor, columns: Tensor) -> list[Tensor]:
        """The same of two sizes that are not known yet, by operations of the program."""
        side = self._grid_side
        rows, columns = paddle.full([1], rows, "int64"), paddle.full([1], columns, "int64")
        same = paddle.logical_and(rows == side, columns == side).astype("float64")
        # At a scale of 1 the matrix is exactly the identity: an image of the trained size is not resized.
        scales = [same + (1.0 - same) * self._resize_scale(size.astype("float64")) for size in (rows, columns)]
        return [
            _symbolic_bicubic_matrix(side, size, scale).astype(self.pos_embed.dtype)
            for size, scale in zip((rows, columns), scales)
        ]

    def _resize_scale(self, size: Union[int, Tensor]) -> Union[float, Tensor]:
        # The official offset of 0.1 was to guard the size against rounding down, but it changes the scale too.
        return (size + 0.1) / self._grid_side if self.pos_embed_mode == "scale" else size / self._grid_side


def _bicubic_matrix(in_size: int, out_size: int, scale: float, dtype: type) -> np.ndarray:
    """Bicubic interpolation (A = -0.75, borders repeated, no antialias) along one axis, as a matrix [out, in].

    A matrix, because F.interpolate rounds the scale to float32 even in float64. dtype: the precision of the
    coordinates; PyTorch computes those of float32 tensors in float32, with one rounding (fused multiply-add).
    """
    center = (dtype(1.0 / scale) * (np.arange(out_size) + 0.5) - 0.5).astype(dtype).astype(np.float64)
    matrix = np.zeros([out_size, in_size])
    for index, weight in _bicubic_taps(center, np.floor(center)):
        np.add.at(matrix, (np.arange(out_size), np.clip(index, 0, in_size - 1).astype(np.int64)), weight)
    return matrix


def _symbolic_bicubic_matrix(in_size: int, out_size: Tensor, scale: Tensor) -> Tensor:
    """`_bicubic_matrix` for float32 as operations of a program that is exported; out_size, scale: [1]."""
    inverse = (1.0 / scale).astype("float32").astype("float64")
    positions = paddle.arange(out_size, dtype="int64").astype("float64") + 0.5
    center = (inverse * positions - 0.5).astype("float32").astype("float64")
    sources = paddle.arange(in_size, dtype="int64").astype("float64")
    matrix = 0.0
    for index, weight in _bicubic_taps(center, paddle.floor(center)):
        hits = index.clip(0.0, in_size - 1.0).unsqueeze(1) == sources
        matrix = matrix + weight.unsqueeze(1) * hits.astype("float64")
    return matrix


def _bicubic_taps(center: Array, floor: Array) -> Iterator[tuple[Array, Array]]:
    """The four pixels that a sample at `center` is made of: index (it may lie outside) and weight.

    Without abs(): Paddle 3.3 optimises this one away when it runs the exported program.
    """
    for offset in (-1.0, 0.0, 1.0, 2.0):
        index = floor + offset
        distance = center - index if offset < 1.0 else index - center
        if offset in (0.0, 1.0):
            yield index, (1.25 * distance - 2.25) * distance**2 + 1.0
        else:
            yield index, -0.75 * (((distance - 5.0) * distance + 8.0) * distance - 4.0)


@BACKBONES.register()
def vit_tiny(
    patch_size: int = 16,
    img_size: int = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    pos_embed_mode: Literal["scale", "size"] = "scale",
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
    pos_embed_mode: Literal["scale", "size"] = "scale",
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
    pos_embed_mode: Literal["scale", "size"] = "scale",
) -> VisionTransformer:
    """ViT-B: 768 wide, 12 blocks, 12 heads, 85.8 M parameters."""
    return VisionTransformer(
        img_size, patch_size, in_chans, 768, 12, 12, drop_path_rate=drop_path_rate, pos_embed_mode=pos_embed_mode
    )
