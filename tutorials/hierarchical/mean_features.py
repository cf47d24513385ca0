"""A baseline to beat: the mean of a region's patch features, which says what there is and not where."""

from paddle import Tensor, nn

from passl.registry import BACKBONES


@BACKBONES.register()
class MeanFeatures(nn.Layer):
    def __init__(self, in_chans: int = 384) -> None:
        super().__init__()
        self.embed_dim = in_chans

    def forward(self, grids: Tensor) -> Tensor:  # [B, in_chans, rows, columns] -> [B, in_chans]
        return grids.mean([2, 3])
