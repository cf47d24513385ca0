"""The projection head of DINO."""

from __future__ import annotations

import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.models.functional import weight_norm_linear
from passl.models.layers import ONE, BatchNorm1D, Linear, check_positive, torch_uniform
from passl.registry import HEADS


class WeightNormLinear(nn.Layer):
    """Linear without bias whose columns have the length `weight_g` and the direction of `weight_v`.

    x: [B, in_dim] -> [B, out_dim]. weight_g: [out_dim], weight_v: [in_dim, out_dim].
    """

    def __init__(self, in_dim: int, out_dim: int, trainable_gain: bool) -> None:
        super().__init__()
        self.weight_g = self.create_parameter([out_dim], default_initializer=ONE)
        self.weight_v = self.create_parameter([in_dim, out_dim], default_initializer=torch_uniform(in_dim))
        self.weight_g.stop_gradient = not trainable_gain

    def forward(self, x: Tensor) -> Tensor:
        return weight_norm_linear(x, self.weight_v, self.weight_g)


@HEADS.register()
class DINOHead(nn.Layer):
    """MLP to a bottleneck, L2 normalisation, weight-normed linear to the prototypes. [B, in_dim] -> [B, out_dim].

    norm_last_layer: keeps the lengths of the prototypes at 1. use_bn: batch norm before each GELU.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        check_positive(out_dim=out_dim, num_layers=num_layers, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        self.out_dim = out_dim
        if num_layers == 1:
            self.mlp = Linear(in_dim, bottleneck_dim)
        else:
            layers: list[nn.Layer] = []
            for dim in [in_dim] + [hidden_dim] * (num_layers - 2):
                layers.append(Linear(dim, hidden_dim))
                if use_bn:
                    layers.append(BatchNorm1D(hidden_dim))
                layers.append(nn.GELU())
            layers.append(Linear(hidden_dim, bottleneck_dim))
            self.mlp = nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, trainable_gain=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), axis=-1))
