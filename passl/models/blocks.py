"""The blocks of vision transformers (Dosovitskiy et al. 2021), over batches of tokens or over packs of several."""

from __future__ import annotations

from typing import Literal, Optional

from paddle import Tensor, nn

from passl.models import functional, packs
from passl.models.layers import (
    INIT_STD,
    LayerNorm,
    LayerScale,
    Linear,
    Mlp,
    SwiGLU,
    check_image_size,
    has_hooks,
    torch_uniform,
)
from passl.models.packs import Sizes
from passl.models.stochastic_depth import DropPath, SubsetDropPath


class Attention(nn.Layer):
    """Multi-head self-attention. x: [B, N, D] -> [B, N, D], or a pack [rows, D] and its sizes -> [rows, D].

    mask: [B, N], 0 for tokens that get no attention; for batches alone.
    cls_only: only the first token of each sequence asks: -> [B, 1, D], or [sum of B_i, D].
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, init_std: float = INIT_STD) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, init_std=init_std)
        self.proj = Linear(dim, dim, init_std=init_std)

    def query_key_value(self, x: Tensor) -> list[Tensor]:
        """[..., D] -> three of [..., D], their last axis in heads: [B, N, heads, D/heads] or [rows, heads, D/heads]"""
        shape = [-1, *x.shape[1:-1], self.num_heads, x.shape[-1] // self.num_heads]
        return [part.reshape(shape) for part in self.qkv(x).split(3, axis=-1)]

    def weights(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The attention weights alone: [B, N, D] -> [B, heads, N, N]."""
        query, key, _ = self.query_key_value(x)
        return functional.attention_weights(query, key, mask)

    def cls_weights(self, x: Tensor) -> Tensor:
        """What the first token attends to, without the N x N weights of all: [B, N, D] -> [B, heads, N]."""
        query, key, _ = self.query_key_value(x)
        return functional.attention_weights(query[:, :1], key).squeeze(2)

    def forward(
        self, x: Tensor, mask: Optional[Tensor] = None, sizes: Optional[Sizes] = None, cls_only: bool = False
    ) -> Tensor:
        query, key, value = self.query_key_value(x)
        query, query_sizes = packs.first_tokens(query, sizes) if cls_only else (query, sizes)
        if sizes is None:
            mixed = functional.attention(query, key, value, mask)
        else:
            mixed = packs.attention(query, key, value, query_sizes, sizes)
        return self.proj(mixed.flatten(-2))


class Block(nn.Layer):
    """Pre-norm transformer block. x: [B, N, D] -> [B, N, D], or a pack [rows, D] and its sizes -> [rows, D].

    mask, cls_only: see Attention.
    layer_scale: first value of the factors on both branches; None for no factors.
    ffn: "swiglu" is narrower than "mlp" by 2/3 (rounded up to a multiple of 8), for about as many weights.
    drop_path_subset: branches are computed only for the samples that keep them, see SubsetDropPath.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        epsilon: float = 1e-6,
        init_std: float = INIT_STD,
        layer_scale: Optional[float] = None,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        drop_path_subset: bool = False,
    ) -> None:
        super().__init__()
        if ffn not in ("mlp", "swiglu"):
            raise ValueError(f"ffn ({ffn!r}) must be 'mlp' or 'swiglu'")
        self.norm1 = LayerNorm(dim, epsilon=epsilon)
        self.attn = Attention(dim, num_heads, qkv_bias, init_std)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, epsilon=epsilon)
        hidden_dim = int(dim * mlp_ratio)
        if ffn == "mlp":
            self.mlp = Mlp(dim, hidden_dim, init_std)
        else:
            self.mlp = SwiGLU(dim, (int(hidden_dim * 2 / 3) + 7) // 8 * 8, init_std)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = (SubsetDropPath if drop_path_subset else DropPath)(drop_path_rate)

    def forward(
        self, x: Tensor, mask: Optional[Tensor] = None, sizes: Optional[Sizes] = None, cls_only: bool = False
    ) -> Tensor:
        def attend(x: Tensor, mask: Optional[Tensor], sizes: Optional[Sizes]) -> Tensor:
            # Attention of somebody's own may know no more than tokens and their mask.
            inputs = (mask, sizes, cls_only) if cls_only or sizes is not None else (mask,)
            return self.ls1(self.attn(self.norm1(x), *inputs))

        def transform(x: Tensor, *_: object) -> Tensor:
            return self.ls2(self.mlp(self.norm2(x)))

        shortcut, own_sizes = packs.first_tokens(x, sizes) if cls_only else (x, sizes)
        x = self.drop_path.add(shortcut, own_sizes, attend, x, mask, sizes)
        return self.drop_path.add(x, own_sizes, transform, x, None, own_sizes)


def are_unchanged(blocks: nn.LayerList) -> bool:
    """Whether all are those of this file, with its own parts, and without hooks. Others take batches alone, and what
    they do to [CLS] may take all tokens.
    """
    return all(_is_unchanged(block) for block in blocks) and not has_hooks(blocks)


def _is_unchanged(block: nn.Layer) -> bool:
    if type(block).forward is not Block.forward:
        return False
    return type(block.attn).forward is Attention.forward and isinstance(block.mlp, (Mlp, SwiGLU))


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
