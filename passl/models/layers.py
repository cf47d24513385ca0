"""The small parts that the networks share."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Optional

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer, PyLayerContext

from passl import distributed
from passl.config import ConfigError
from passl.models import functional

# The official trunc_normal_(std=0.02) cuts at +-2, which is 100 standard deviations: a plain normal. Paddle's
# TruncatedNormal cuts at 2 standard deviations and would give 0.0176.
INIT_STD = 0.02
NORMAL_002 = nn.initializer.Normal(std=INIT_STD)
ZERO = nn.initializer.Constant(0.0)
ONE = nn.initializer.Constant(1.0)


_REPEATS = contextvars.ContextVar("whether this forward repeats one that was counted", default=False)


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """Inside, batch norms leave their running statistics alone: they have seen this batch before."""
    token = _REPEATS.set(True)
    try:
        yield
    finally:
        _REPEATS.reset(token)


def torch_uniform(fan_in: int) -> nn.initializer.Initializer:
    """U(+-1/sqrt(fan_in)): what PyTorch gives to a Linear or Conv2d that nobody initialises."""
    bound = 1.0 / math.sqrt(fan_in)
    return nn.initializer.Uniform(-bound, bound)


def check_positive(**sizes: int) -> None:
    """Raises ValueError, with the name, for a size of a network that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")


def check_image_size(height: int, width: int, patch_size: int) -> None:
    """Raises ConfigError for sides in pixels that patches do not fill. Those that a program being exported does
    not know yet (tensors) pass.
    """
    if isinstance(height, int) and isinstance(width, int) and (height % patch_size or width % patch_size):
        problem = f"image height and width ({height} x {width}) must be multiples of patch_size ({patch_size})"
        raise ConfigError([problem])


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


class Mlp(nn.Layer):
    """Linear, exact (erf) GELU, linear. x: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, init_std: float = INIT_STD) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, init_std=init_std)
        self.fc2 = Linear(hidden_dim, dim, init_std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Layer):
    """Gated linear unit (Shazeer 2020): w3(silu(a) * b), where a and b are the halves of w12(x). [..., dim] -> same."""

    def __init__(self, dim: int, hidden_dim: int, init_std: float = INIT_STD) -> None:
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden_dim, init_std=init_std)
        self.w3 = Linear(hidden_dim, dim, init_std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, axis=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Layer):
    """One learned factor per channel (Touvron et al. 2021), `initial_value` at first. [..., dim] -> [..., dim]"""

    def __init__(self, dim: int, initial_value: float) -> None:
        super().__init__()
        self.gamma = self.create_parameter([dim], default_initializer=nn.initializer.Constant(initial_value))

    def forward(self, x: Tensor) -> Tensor:
        return functional.scale(x, self.gamma)


class BatchNorm1D(nn.BatchNorm1D):
    """Batch norm over the batches of all processes, as in the official code, where it is PyTorch's SyncBatchNorm.

    The running statistics are PyTorch's: Paddle keeps the biased variance. In training every process must call it
    equally often; in eval mode nothing is exchanged. x: [B, D] -> [B, D].
    """

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(self, x)


class BatchNorm2D(nn.BatchNorm2D):
    """The same for images. x: [B, C, H, W] -> [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(self, x)


def _batch_norm(layer: nn.Layer, x: Tensor) -> Tensor:
    """x: [B, C, ...] -> same shape; in training the running statistics of `layer` move as in PyTorch."""
    if not layer.training:
        if paddle.in_dynamic_mode() and x.dtype == paddle.float32 and x.place.is_cpu_place():
            return _normalise_exactly(layer, x)
        return F.batch_norm(x, layer._mean, layer._variance, layer.weight, layer.bias, epsilon=layer._epsilon)
    normalise = _normalise_by_all if distributed.world_size() > 1 else _normalise_by_own
    y, mean, variance = normalise(layer, x)
    if _REPEATS.get():
        return y
    with paddle.no_grad():
        for running, batch in ((layer._mean, mean), (layer._variance, variance)):
            running.set_value(layer._momentum * running + (1.0 - layer._momentum) * batch)
    return y


def _normalise_exactly(layer: nn.Layer, x: Tensor) -> Tensor:
    """x by the running statistics, on a CPU, whose kernel approximates 1/sqrt(variance): by 1.2e-7 too much at 1, which
    adds up over the layers of a ResNet. At 4/9 it is exact to 4e-9, so the rest is put into the weight.
    """
    scale = layer.weight.astype("float64") / (layer._variance.astype("float64") + layer._epsilon).sqrt()
    shift = layer.bias.astype("float64") - scale * layer._mean.astype("float64")
    zero = paddle.zeros_like(layer._mean)
    scale = (scale * (2 / 3)).astype(zero.dtype)
    return F.batch_norm(x, zero, paddle.full_like(zero, 4 / 9), scale, shift.astype(zero.dtype), epsilon=0.0)


def _normalise_by_own(layer: nn.Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised x, mean [C], unbiased variance [C]) by the statistics of this process's batch."""
    count = x.size // x.shape[1]
    if count < 2:
        problem = f"batch norm needs at least 2 values per channel in training, got {count}: use larger batches"
        raise ConfigError([problem])
    mean, variance = paddle.zeros_like(layer._mean), paddle.zeros_like(layer._variance)
    # Momentum 0 brings out the batch's own statistics; the kernel knows others in float32 only.
    y = F.batch_norm(x, mean, variance, layer.weight, layer.bias, True, 0.0, layer._epsilon)
    if _variance_is_biased(paddle.get_device()):
        variance *= count / (count - 1.0)
    return y, mean, variance


def _normalise_by_all(layer: nn.Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the statistics of all processes' batches, which may be of different sizes.

    Two processes have two values per channel at least. Paddle's SyncBatchNorm has no CPU kernel and keeps the biased
    variance.
    """
    with paddle.amp.auto_cast(enable=False):
        mean, squares, count = _statistics_of_all(x)
        y = _BatchNormOfAll.apply(x, layer.weight, layer.bias, mean, squares / count, count, layer._epsilon)
    return y, mean, squares / (count - 1.0)


@paddle.no_grad()
def _statistics_of_all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, C, ...] -> mean [C], sum of squared deviations from it [C], and number of values [1], of all processes."""
    x = _full_precision(x)
    axes = _batch_axes(x)
    mean = x.mean(axes)
    squares = _per_channel(x, paddle.ones_like(mean), -mean).square().sum(axes)
    own = paddle.concat([paddle.full([1], float(x.size // x.shape[1]), x.dtype), mean, squares])
    # Gathered, not summed: all processes then add up the same numbers in the same order, to the same last bit.
    counts, means, squares = distributed.all_gather(own).split([1, x.shape[1], x.shape[1]], axis=1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0), count


class _BatchNormOfAll(PyLayer):
    """Batch norm by given statistics, with the gradients that it has because they come from all batches."""

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        epsilon: float,
    ) -> Tensor:
        """x: [B, C, ...]; weight, bias, mean, variance: [C]; count: [1] -> the shape and type of x."""
        ctx.save_for_backward(x, weight, mean, (variance + epsilon).rsqrt(), count)
        ctx.wanted = [not tensor.stop_gradient for tensor in (x, weight, bias)]
        return F.batch_norm(x, mean, variance, weight, bias, epsilon=epsilon)

    @staticmethod
    def backward(ctx: PyLayerContext, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensor()
        axes = _batch_axes(x)
        gradient = _full_precision(gradient)
        normalised = _per_channel(_full_precision(x), inverse_std, -mean * inverse_std)
        # Those of weight and bias stay this process's: DataParallel averages them with all others.
        d_bias, d_weight = gradient.sum(axes), (gradient * normalised).sum(axes)
        mean_gradient, mean_product = (distributed.all_reduce_sum_(paddle.concat([d_bias, d_weight])) / count).chunk(2)
        scale = weight * inverse_std
        d_x = _per_channel(gradient, scale, -scale * mean_gradient)
        d_x -= _per_channel(normalised, scale * mean_product, paddle.zeros_like(scale))
        gradients = zip((d_x.astype(x.dtype), d_weight, d_bias), ctx.wanted)
        return (*(d if wanted else None for d, wanted in gradients), None, None, None)


def _batch_axes(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [axis for axis in range(x.ndim) if axis != 1]


def _per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, x: [B, C, ...], scale and shift: [C]."""
    # On a CPU this kernel is ten times as fast as the broadcast product.
    return F.batch_norm(x, paddle.zeros_like(scale), paddle.ones_like(scale), scale, shift, epsilon=0.0)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype in (paddle.float32, paddle.float64) else x.astype("float32")


@functools.cache
def _variance_is_biased(device: str) -> bool:
    """Whether the batch norm of the current device keeps the biased variance, as on a CPU; cuDNN's is unbiased."""
    mean, variance, one = paddle.zeros([1]), paddle.zeros([1]), paddle.ones([1])
    F.batch_norm(paddle.to_tensor([[0.0], [2.0]]), mean, variance, one, one, training=True, momentum=0.0)
    return variance.item() < 1.5


def in_full_precision(layer: nn.Layer, x: Tensor) -> Tensor:
    """`layer(x)` in the precision of the layer's weights, also where autocast would choose a lower one."""
    with paddle.amp.auto_cast(enable=False):
        return layer(x.astype(next(iter(layer.parameters()), x).dtype))


_STATISTICS = ("_mean", "_variance")


def learned_parameters(layer: nn.Layer) -> list[Tensor]:
    """All parameters, trainable or not, without the running statistics, which are parameters too in Paddle."""
    return [p for name, p in layer.named_parameters() if name.rpartition(".")[2] not in _STATISTICS]


def running_statistics(layer: nn.Layer) -> list[Tensor]:
    """What forward passes in training leave behind: statistics of batch norms."""
    return [p for name, p in layer.named_parameters() if name.rpartition(".")[2] in _STATISTICS]


def has_hooks(layer: nn.Layer) -> bool:
    """Whether somebody looks at what passes through a layer, or one below it."""
    return any(part._forward_pre_hooks or part._forward_post_hooks for part in layer.sublayers(include_self=True))
