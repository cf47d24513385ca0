"""The upper half of a hierarchical transformer (Chen et al. 2022): the features of patches become those of a region."""

from __future__ import annotations

import functools

from paddle import Tensor, nn

from passl.config import ConfigError
from passl.models.layers import INIT_STD, Linear, check_positive
from passl.models.positions import Mode
from passl.models.vision_transformer import Block, TokenTransformer
from passl.registry import BACKBONES


@BACKBONES.register()
class RegionTransformer(TokenTransformer):
    """Transformer over a grid of features, one token for each, with the names of clemsgrs/dino.

    Its inputs are grids [B, in_chans, H, W] of any H and W, say the [CLS] features of the 16 x 16 patches, of 256
    pixels each, of a region in a slide. Masks are [B, 1+H*W].
    grid_size: side of the grid that the position embeddings are for; they are resized to others.
    drop_rate: dropout of the embedded features in training.
    pos_embed_mode, init_std: see VisionTransformer.
    """

    patch_size = 1

    def __init__(
        self,
        in_chans: int = 384,
        grid_size: int = 14,
        embed_dim: int = 192,
        depth: int = 6,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        epsilon: float = 1e-6,
        pos_embed_mode: Mode = "size",
        init_std: float = INIT_STD,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads)
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate ({drop_rate}) must be in [0, 1)")
        self.in_chans = in_chans
        self.phi = nn.Sequential(Linear(in_chans, embed_dim, init_std=init_std), nn.GELU(), nn.Dropout(drop_rate))
        block = functools.partial(Block, embed_dim, num_heads, mlp_ratio, qkv_bias, epsilon=epsilon, init_std=init_std)
        self._build(block, embed_dim, depth, drop_path_rate, epsilon, grid_size, pos_embed_mode)

    def embed(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.in_chans:
            problem = f"the features of the patches are {images.shape[1]} wide, and in_chans is {self.in_chans}"
            raise ConfigError([problem])
        return self.phi(images.flatten(2).transpose([0, 2, 1]))


@BACKBONES.register()
def hvit_xs(
    in_chans: int = 384, grid_size: int = 14, drop_path_rate: float = 0.0, drop_rate: float = 0.0
) -> RegionTransformer:
    """The region model of clemsgrs (ViT-S/4096_256): 192 wide, 6 blocks, 6 heads, 2.8 M parameters."""
    return RegionTransformer(in_chans, grid_size, drop_path_rate=drop_path_rate, drop_rate=drop_rate)
