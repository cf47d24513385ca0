"""The small parts that the networks share."""

from __future__ import annotations

import math

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.models import functional

# The official trunc_normal_(std=0.02) cuts at +-2, which is 100 standard deviations: a plain normal. Paddle's
# TruncatedNormal cuts at 2 standard deviations and would give 0.0176.
INIT_STD = 0.02
NORMAL_002 = nn.initializer.Normal(std=INIT_STD)
ZERO = nn.initializer.Constant(0.0)
ONE = nn.initializer.Constant(1.0)


def torch_uniform(fan_in: int) -> nn.initializer.Initializer:
    """U(+-1/sqrt(fan_in)): what PyTorch gives to a Linear or Conv2d that nobody initialises."""
    bound = 1.0 / math.sqrt(fan_in)
    return nn.initializer.Uniform(-bound, bound)


class Linear(nn.Linear):
    """A linear layer as transformers and heads begin with: N(0, init_std), bias 0. [..., in] -> [..., out]"""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, init_std: float = INIT_STD) -> None:
        normal = nn.initializer.Normal(std=init_std)
        super().__init__(in_dim, out_dim, weight_attr=normal, bias_attr=ZERO if bias else False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Normalisation of the last axis. [..., D] -> [..., D]"""

    def __init__(self, dim: int, epsilon: float = 1e-6) -> None:
        super().__init__(dim, epsilon=epsilon)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.epsilon)


class DropPath(nn.Layer):
    """Stochastic depth (Huang et al. 2016): drops whole samples of a residual branch in training.

    Kept samples are divided by the probability of keeping. x: [B, ...] -> same shape.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate ({rate}) must be in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = paddle.bernoulli(paddle.full([x.shape[0]] + [1] * (x.ndim - 1), keep, dtype="float32"))
        return x * (mask / keep).astype(x.dtype)


class Mlp(nn.Layer):
    """Linear, exact (erf) GELU, linear. x: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, init_std: float = INIT_STD) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, init_std=init_std)
        self.fc2 = Linear(hidden_dim, dim, init_std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class BatchNorm1D(nn.BatchNorm1D):
    """Batch norm with PyTorch's running statistics: Paddle keeps the biased variance. x: [B, D] -> [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] < 2:
            raise ValueError(f"batch norm needs at least 2 rows in training, got {x.shape[0]}")
        mean, variance = self._mean, self._variance
        if self.training:
            self._update_statistics(x)
            mean, variance = mean.clone(), variance.clone()  # for F.batch_norm to update in its own way
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self._momentum, self._epsilon)

    @paddle.no_grad()
    def _update_statistics(self, x: Tensor) -> None:
        x = x.astype(self._mean.dtype)
        mean = x.mean(0)
        variance = (x - mean).square().sum(0) / (x.shape[0] - 1.0)  # x.var(0) warns of its own type promotion
        for running, batch in ((self._mean, mean), (self._variance, variance)):
            running.set_value(self._momentum * running + (1.0 - self._momentum) * batch)


def learned_parameters(layer: nn.Layer) -> list[Tensor]:
    """All parameters, trainable or not, without the running statistics, which are parameters too in Paddle."""
    return [p for name, p in layer.named_parameters() if name.rpartition(".")[2] not in ("_mean", "_variance")]
