"""Cross-covariance image transformer (XCiT, El-Nouby et al. 2021) without a classifier, with the official names."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.models import functional
from passl.models.layers import (
    NORMAL_002,
    ONE,
    BatchNorm2D,
    LayerNorm,
    Linear,
    Mlp,
    check_image_size,
    check_positive,
    torch_uniform,
)
from passl.models.stochastic_depth import DropPath
from passl.registry import BACKBONES

# Halvings of the resolution in the patch embedding.
_STRIDES = {8: 3, 16: 4}


def _conv(
    in_dim: int, out_dim: int, kernel_size: int, stride: int = 1, groups: int = 1, bias: bool = True
) -> nn.Conv2D:
    """A convolution that keeps the size (divided by the stride), with PyTorch's default initialisation."""
    uniform = torch_uniform(in_dim // groups * kernel_size**2)
    return nn.Conv2D(
        in_dim,
        out_dim,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        groups=groups,
        weight_attr=uniform,
        bias_attr=uniform if bias else False,
    )


class ConvPatchEmbed(nn.Layer):
    """A few strided convolutions in place of one large one. [B, C, H, W] -> [B, D, H/P, W/P]"""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        halvings = _STRIDES[patch_size]
        widths = [in_chans] + [embed_dim // 2**power for power in reversed(range(halvings))]
        layers: list[nn.Layer] = []
        for in_dim, out_dim in zip(widths, widths[1:]):
            layers += [nn.Sequential(_conv(in_dim, out_dim, 3, 2, bias=False), BatchNorm2D(out_dim)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        check_image_size(*images.shape[-2:], self.patch_size)
        return self.proj(images)


class FourierPositions(nn.Layer):
    """Position encodings for any grid: a learned projection of sines and cosines. height, width -> [1, D, h, w]."""

    num_frequencies = 32  # of each axis, half of them sines

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = _conv(2 * self.num_frequencies, dim, 1)

    @paddle.jit.not_to_static  # nothing here belongs into an exported program but the projection
    def forward(self, height: int, width: int) -> Tensor:
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ValueError("the positions of XCiT need a fixed image size to be exported")
        shape = [self.num_frequencies, height, width]
        rows = np.broadcast_to(self._waves(height)[:, :, None], shape)
        columns = np.broadcast_to(self._waves(width)[:, None, :], shape)
        waves = paddle.to_tensor(np.concatenate([rows, columns])[None])
        return self.token_projection(waves.astype(self.token_projection.weight.dtype))

    def _waves(self, size: int) -> np.ndarray:
        """[num_frequencies, size]: sine and cosine in turns, of pairs of one frequency. Positions end at one turn."""
        angle = np.arange(1, size + 1) / (size + 1e-6) * 2.0 * math.pi
        pair = np.arange(self.num_frequencies) // 2
        angle = angle * 10000.0 ** (-2.0 * pair / self.num_frequencies)[:, None]
        return np.where(np.arange(self.num_frequencies)[:, None] % 2, np.cos(angle), np.sin(angle))


class CrossCovarianceAttention(nn.Layer):
    """Attention between channels in place of tokens: linear in the number of tokens. x: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = self.create_parameter([num_heads, 1, 1], default_initializer=ONE)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens, dim = x.shape[1:]
        channels = self.qkv(x).transpose([0, 2, 1]).reshape([-1, 3, self.num_heads, dim // self.num_heads, tokens])
        query, key, value = channels.unbind(1)  # [B, heads, D/heads, N]
        query, key = functional.normalize(query), functional.normalize(key)
        weights = F.softmax(paddle.matmul(query, key, transpose_y=True) * self.temperature, axis=-1)
        mixed = paddle.matmul(weights, value).reshape([-1, dim, tokens])
        return self.proj(mixed.transpose([0, 2, 1]))


class LocalPatchInteraction(nn.Layer):
    """Two depthwise convolutions, through which neighbouring patches speak. x: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = _conv(dim, dim, 3, groups=dim)
        self.bn = BatchNorm2D(dim)
        self.conv2 = _conv(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        grid = x.transpose([0, 2, 1]).reshape([-1, x.shape[2], height, width])
        grid = self.conv2(self.bn(F.gelu(self.conv1(grid))))
        return grid.flatten(2).transpose([0, 2, 1])


class CrossCovarianceBlock(nn.Layer):
    """Channel attention, local interaction, MLP; each branch has its scale gamma. x: [B, N, D] -> [B, N, D]."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path_rate: float, layer_scale: float, epsilon: float
    ) -> None:
        super().__init__()
        scale = nn.initializer.Constant(layer_scale)
        self.gamma1 = self.create_parameter([dim], default_initializer=scale)
        self.gamma2 = self.create_parameter([dim], default_initializer=scale)
        self.gamma3 = self.create_parameter([dim], default_initializer=scale)
        self.norm1 = LayerNorm(dim, epsilon)
        self.attn = CrossCovarianceAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, epsilon)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = LayerNorm(dim, epsilon)
        self.local_mp = LocalPatchInteraction(dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        x = x + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x), height, width))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class ClassAttention(nn.Layer):
    """What the first token sees of all tokens (Touvron et al. 2021b). x: [B, N, D] -> [B, 1, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def _query_key_value(self, x: Tensor) -> list[Tensor]:
        """[B, N, D] -> three of [B, N, heads, D/heads]"""
        tokens, dim = x.shape[1:]
        return self.qkv(x).reshape([-1, tokens, 3, self.num_heads, dim // self.num_heads]).unbind(2)

    def cls_weights(self, x: Tensor) -> Tensor:
        """What the [CLS] token attends to: [B, N, D] -> [B, heads, N]."""
        query, key, _ = self._query_key_value(x)
        return functional.attention_weights(query[:, :1], key).squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._query_key_value(x)
        return self.proj(functional.attention(query[:, :1], key, value).reshape([-1, 1, x.shape[2]]))


class ClassAttentionBlock(nn.Layer):
    """Moves what the patches know into the [CLS] token, which comes first. x: [B, 1+N, D] -> [B, 1+N, D].

    tokens_norm: norm2 is for all tokens, or for the [CLS] alone.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float, tokens_norm: bool, epsilon: float
    ) -> None:
        super().__init__()
        scale = nn.initializer.Constant(layer_scale)
        self.tokens_norm = tokens_norm
        self.gamma1 = self.create_parameter([dim], default_initializer=scale)
        self.gamma2 = self.create_parameter([dim], default_initializer=scale)
        self.norm1 = LayerNorm(dim, epsilon)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, epsilon)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        # Two habits of the official code that its weights rely on: the patch tokens too go through both residual
        # branches, unchanged; and the second branch starts from the normalised tokens, not from those before norm2.
        normal = self.norm1(x)
        x = x + self.gamma1 * paddle.concat([self.attn(normal), normal[:, 1:]], axis=1)
        x = self.norm2(x) if self.tokens_norm else paddle.concat([self.norm2(x[:, :1]), x[:, 1:]], axis=1)
        return x + paddle.concat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], axis=1)


@BACKBONES.register()
class XCiT(nn.Layer):
    """Transformer with attention between channels, so that its cost is linear in the number of patches.

    drop_path_rate: the same for all blocks but the class attention's, which drop nothing.
    layer_scale: first value of the learned factor on each residual branch. tokens_norm: see ClassAttentionBlock.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1.0,
        tokens_norm: bool = True,
        cls_attn_depth: int = 2,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        if patch_size not in _STRIDES:
            raise ValueError(f"patch_size ({patch_size}) must be 8 or 16")
        check_positive(in_chans=in_chans, depth=depth, num_heads=num_heads, cls_attn_depth=cls_attn_depth)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        if embed_dim < patch_size // 2:
            raise ValueError(f"embed_dim ({embed_dim}) must be at least patch_size / 2 ({patch_size // 2})")
        self.embed_dim = embed_dim
        self.cls_token = self.create_parameter([1, 1, embed_dim], default_initializer=NORMAL_002)
        self.patch_embed = ConvPatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.LayerList(
            [
                CrossCovarianceBlock(embed_dim, num_heads, mlp_ratio, drop_path_rate, layer_scale, epsilon)
                for _ in range(depth)
            ]
        )
        self.cls_attn_blocks = nn.LayerList(
            [
                ClassAttentionBlock(embed_dim, num_heads, mlp_ratio, layer_scale, tokens_norm, epsilon)
                for _ in range(cls_attn_depth)
            ]
        )
        self.norm = LayerNorm(embed_dim, epsilon)
        self.pos_embeder = FourierPositions(embed_dim)  # misspelt in the official files

    def forward(self, images: Tensor) -> Tensor:
        """The normalised [CLS] token: [B, C, H, W] -> [B, D]. H and W must be multiples of the patch size."""
        x, _ = self.patch_tokens(images)
        x = self.with_cls_token(x)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def patch_tokens(self, images: Tensor, num_blocks: Optional[int] = None) -> tuple[Tensor, tuple[int, int]]:
        """The patches behind so many blocks (default: all): [B, C, H, W] -> [B, h*w, D] and (h, w)."""
        grid = self.patch_embed(images)
        height, width = grid.shape[-2:]
        x = (grid + self.pos_embeder(height, width)).flatten(2).transpose([0, 2, 1])
        for block in self.blocks[:num_blocks]:
            x = block(x, height, width)
        return x, (height, width)

    def with_cls_token(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, 1+N, D]"""
        return paddle.concat([self.cls_token.expand([x.shape[0], -1, -1]), x], axis=1)


@BACKBONES.register()
def xcit_nano_12_p16(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-N12/16: 128 wide, 12 blocks, 4 heads, 2.9 M parameters."""
    return XCiT(16, in_chans, 128, 12, 4, drop_path_rate=drop_path_rate, tokens_norm=False)


@BACKBONES.register()
def xcit_nano_12_p8(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-N12/8: 128 wide, 12 blocks, 4 heads, 2.9 M parameters."""
    return XCiT(8, in_chans, 128, 12, 4, drop_path_rate=drop_path_rate, tokens_norm=False)


@BACKBONES.register()
def xcit_tiny_12_p16(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-T12/16: 192 wide, 12 blocks, 4 heads, 6.5 M parameters."""
    return XCiT(16, in_chans, 192, 12, 4, drop_path_rate=drop_path_rate)


@BACKBONES.register()
def xcit_tiny_12_p8(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-T12/8: 192 wide, 12 blocks, 4 heads, 6.5 M parameters."""
    return XCiT(8, in_chans, 192, 12, 4, drop_path_rate=drop_path_rate)


@BACKBONES.register()
def xcit_tiny_24_p16(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-T24/16: 192 wide, 24 blocks, 4 heads, 11.9 M parameters."""
    return XCiT(16, in_chans, 192, 24, 4, drop_path_rate=drop_path_rate, layer_scale=1e-5)


@BACKBONES.register()
def xcit_tiny_24_p8(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-T24/8: 192 wide, 24 blocks, 4 heads, 11.9 M parameters."""
    return XCiT(8, in_chans, 192, 24, 4, drop_path_rate=drop_path_rate, layer_scale=1e-5)


@BACKBONES.register()
def xcit_small_12_p16(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-S12/16: 384 wide, 12 blocks, 8 heads, 25.9 M parameters."""
    return XCiT(16, in_chans, 384, 12, 8, drop_path_rate=drop_path_rate)


@BACKBONES.register()
def xcit_small_12_p8(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-S12/8: 384 wide, 12 blocks, 8 heads, 25.9 M parameters."""
    return XCiT(8, in_chans, 384, 12, 8, drop_path_rate=drop_path_rate)


@BACKBONES.register()
def xcit_small_24_p16(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-S24/16: 384 wide, 24 blocks, 8 heads, 47.3 M parameters."""
    return XCiT(16, in_chans, 384, 24, 8, drop_path_rate=drop_path_rate, layer_scale=1e-5)


@BACKBONES.register()
def xcit_small_24_p8(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-S24/8: 384 wide, 24 blocks, 8 heads, 47.3 M parameters."""
    return XCiT(8, in_chans, 384, 24, 8, drop_path_rate=drop_path_rate, layer_scale=1e-5)


@BACKBONES.register()
def xcit_medium_24_p16(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-M24/16: 512 wide, 24 blocks, 8 heads, 83.9 M parameters."""
    return XCiT(16, in_chans, 512, 24, 8, drop_path_rate=drop_path_rate, layer_scale=1e-5)


@BACKBONES.register()
def xcit_medium_24_p8(in_chans: int = 3, drop_path_rate: float = 0.0) -> XCiT:
    """XCiT-M24/8: 512 wide, 24 blocks, 8 heads, 83.9 M parameters."""
    return XCiT(8, in_chans, 512, 24, 8, drop_path_rate=drop_path_rate, layer_scale=1e-5)
