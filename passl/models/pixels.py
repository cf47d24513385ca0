"""The baseline that any learned feature has to beat: the pixels themselves."""

from __future__ import annotations

from paddle import Tensor, nn

from passl.registry import BACKBONES


@BACKBONES.register()
class RawPixels(nn.Layer):
    """[B, C, H, W] -> [B, C*H*W]; nothing to learn. Only for evaluation: `embed_dim` is known for `img_size` alone."""

    def __init__(self, img_size: int = 224, in_chans: int = 3) -> None:
        super().__init__()
        self.embed_dim = in_chans * img_size * img_size

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)
