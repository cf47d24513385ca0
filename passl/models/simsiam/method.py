"""SimSiam as a method: two views of an image, each of which foretells the other. No teacher, no prototypes."""

from __future__ import annotations

from typing import Callable

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.config import ConfigError
from passl.models.layers import BatchNorm1D, Linear, check_positive, in_full_precision
from passl.models.method import Method
from passl.registry import METHODS


@METHODS.register()
class SimSiam(Method):
    """Exploring simple Siamese representation learning (Chen & He 2021).

    backbone: a builder, of a layer with `embed_dim`.
    out_dim: width of the projections and predictions. hidden_dim: of the predictor's bottleneck.
    num_layers: of the projector; the paper has 3, and 2 on CIFAR.
    """

    def __init__(
        self, backbone: Callable[..., nn.Layer], out_dim: int = 2048, hidden_dim: int = 512, num_layers: int = 3
    ) -> None:
        super().__init__()
        check_positive(out_dim=out_dim, hidden_dim=hidden_dim, num_layers=num_layers)
        self.backbone = backbone()
        self.projector = projector(self.backbone.embed_dim, out_dim, num_layers)
        self.predictor = nn.Sequential(
            Linear(out_dim, hidden_dim, bias=False), BatchNorm1D(hidden_dim), nn.ReLU(), Linear(hidden_dim, out_dim)
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: "global_crops" [2*B, C, H, W], view by view, as MultiCrop makes them; local ones have no part in it.

        Returns:
            loss: -1 is the best. output_std: 1 if the projections point everywhere, 0 if all are alike: collapsed.
        """
        if "global_crops" not in batch:
            raise ConfigError(
                [
                    f"SimSiam needs 'global_crops', and the batch has only {', '.join(batch) or 'nothing'}: give the "
                    "data set of DataLoader.Train the transform MultiCrop with num_local_crops: 0"
                ]
            )
        # One after the other: the batch norms see one view of each image.
        features = [self.backbone(view) for view in batch["global_crops"].chunk(2)]
        projections = [in_full_precision(self.projector, x) for x in features]
        predictions = [in_full_precision(self.predictor, z) for z in projections]
        loss = symmetric_loss(predictions, projections)
        return {"loss": loss, "output_std": output_std(projections[0])}

    def half_precision_layers(self) -> list[nn.Layer]:
        """Not the heads, whose batch norms need their digits."""
        return [self.backbone]


def projector(in_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    """Linear layers with batch norm and ReLU, but for the last, which has batch norm without gain and bias."""
    layers: list[nn.Layer] = []
    for dim in [in_dim] + [out_dim] * (num_layers - 2) if num_layers > 1 else []:
        layers += [Linear(dim, out_dim, bias=False), BatchNorm1D(out_dim), nn.ReLU()]
    fixed = paddle.ParamAttr(trainable=False)
    last = Linear(in_dim if num_layers == 1 else out_dim, out_dim, bias=False)
    return nn.Sequential(*layers, last, BatchNorm1D(out_dim, weight_attr=fixed, bias_attr=fixed))


def symmetric_loss(predictions: list[Tensor], projections: list[Tensor]) -> Tensor:
    """Half of -cos(p1, z2) - cos(p2, z1) (equation 4): means over the batch. All [B, D]. The z get no gradient."""
    first, second = (F.normalize(p, axis=-1) for p in predictions)
    target, other = (F.normalize(z.detach(), axis=-1) for z in projections)
    return -0.5 * ((first * other).sum(-1).mean() + (second * target).sum(-1).mean())


@paddle.no_grad()
def output_std(projections: Tensor) -> Tensor:
    """Of the normalised outputs [B, D], the standard deviation of each channel, on average, times sqrt(D)."""
    outputs = F.normalize(projections, axis=-1)
    # Not std(), which mixes two types on the way and makes Paddle say so.
    return (outputs - outputs.mean(0)).square().mean(0).sqrt().mean() * outputs.shape[1] ** 0.5
