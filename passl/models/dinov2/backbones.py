"""The vision transformers of DINOv2 (Oquab et al. 2023), without and with registers (Darcet et al. 2023).

layer_scale: first value of the factors on the branches; 1.0 as in the official hub, 1e-5 in the official training.
drop_path_uniform, drop_path_subset: see VisionTransformer; both are on in the official training.
ffn (large): the official training took "swiglu" from L on; the published weights are distilled, and L has an "mlp".
"""

from __future__ import annotations

from typing import Literal

from passl.models.vision_transformer import VisionTransformer
from passl.registry import BACKBONES


def _vision_transformer(
    sizes: tuple[int, int, int],
    patch_size: int,
    img_size: int,
    in_chans: int,
    drop_path_rate: float,
    num_register_tokens: int,
    layer_scale: float,
    drop_path_uniform: bool,
    drop_path_subset: bool,
    ffn: Literal["mlp", "swiglu"] = "mlp",
) -> VisionTransformer:
    """sizes: embed_dim, depth, num_heads"""
    return VisionTransformer(
        img_size,
        patch_size,
        in_chans,
        *sizes,
        drop_path_rate=drop_path_rate,
        # The published models with registers came later, and were trained with a better resize.
        pos_embed_mode="antialias" if num_register_tokens else "scale",
        num_register_tokens=num_register_tokens,
        layer_scale=layer_scale,
        ffn=ffn,
        mask_token=True,
        drop_path_uniform=drop_path_uniform,
        drop_path_subset=drop_path_subset,
    )


@BACKBONES.register()
def dinov2_vit_small(
    patch_size: int = 14,
    img_size: int = 518,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    num_register_tokens: int = 0,
    layer_scale: float = 1.0,
    drop_path_uniform: bool = False,
    drop_path_subset: bool = False,
) -> VisionTransformer:
    """ViT-S: 384 wide, 12 blocks, 6 heads, 22.1 M parameters."""
    return _vision_transformer(
        (384, 12, 6),
        patch_size,
        img_size,
        in_chans,
        drop_path_rate,
        num_register_tokens,
        layer_scale,
        drop_path_uniform,
        drop_path_subset,
    )


@BACKBONES.register()
def dinov2_vit_base(
    patch_size: int = 14,
    img_size: int = 518,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    num_register_tokens: int = 0,
    layer_scale: float = 1.0,
    drop_path_uniform: bool = False,
    drop_path_subset: bool = False,
) -> VisionTransformer:
    """ViT-B: 768 wide, 12 blocks, 12 heads, 86.6 M parameters."""
    return _vision_transformer(
        (768, 12, 12),
        patch_size,
        img_size,
        in_chans,
        drop_path_rate,
        num_register_tokens,
        layer_scale,
        drop_path_uniform,
        drop_path_subset,
    )


@BACKBONES.register()
def dinov2_vit_large(
    patch_size: int = 14,
    img_size: int = 518,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    num_register_tokens: int = 0,
    layer_scale: float = 1.0,
    drop_path_uniform: bool = False,
    drop_path_subset: bool = False,
    ffn: Literal["mlp", "swiglu"] = "mlp",
) -> VisionTransformer:
    """ViT-L: 1024 wide, 24 blocks, 16 heads, 304.4 M parameters."""
    return _vision_transformer(
        (1024, 24, 16),
        patch_size,
        img_size,
        in_chans,
        drop_path_rate,
        num_register_tokens,
        layer_scale,
        drop_path_uniform,
        drop_path_subset,
        ffn,
    )


@BACKBONES.register()
def dinov2_vit_giant(
    patch_size: int = 14,
    img_size: int = 518,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    num_register_tokens: int = 0,
    layer_scale: float = 1.0,
    drop_path_uniform: bool = False,
    drop_path_subset: bool = False,
) -> VisionTransformer:
    """ViT-g: 1536 wide, 40 blocks, 24 heads, gated MLPs, 1136.5 M parameters."""
    return _vision_transformer(
        (1536, 40, 24),
        patch_size,
        img_size,
        in_chans,
        drop_path_rate,
        num_register_tokens,
        layer_scale,
        drop_path_uniform,
        drop_path_subset,
        "swiglu",
    )
