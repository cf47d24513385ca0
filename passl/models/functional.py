"""Operations of transformers whose Paddle kernels are slow on a CPU: the same values and gradients by faster means.

Elsewhere than in eager mode on a CPU each function is Paddle's own. What is slow there (PLATFORM: measured with 3.3.1 and 2.6.2):
sums over rows (a matrix product with ones is 25 times faster), the gradients of GELU and LayerNorm, copies of strided tensors.
"""

from __future__ import annotations

import math

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer


def on_cpu(x: Tensor) -> bool:
    """Whether to take the means for a CPU; exported programs have Paddle's own operations."""
    return paddle.in_dynamic_mode() and x.place.is_cpu_place()


def row_sum(rows: Tensor) -> Tensor:
    """[N, D] -> [D], the sum over the rows."""
    return paddle.matmul(paddle.ones([1, rows.shape[0]], rows.dtype), rows)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: [..., in_dim], weight: [in_dim, out_dim], bias: [out_dim] -> [..., out_dim]"""
    return _Linear.apply(x, weight, bias) if on_cpu(x) else F.linear(x, weight, bias)


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.input_needs_gradient = not x.stop_gradient
        in_dim, out_dim = weight.shape
        rows = paddle.addmm(bias.unsqueeze(0), x.reshape([-1, in_dim]), weight)
        return rows.reshape(x.shape[:-1] + [out_dim])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensor()
        in_dim, out_dim = weight.shape
        rows = gradient.reshape([-1, out_dim])
        grad_weight = paddle.matmul(x.reshape([-1, in_dim]), rows, transpose_x=True)
        grad_x = paddle.matmul(gradient, weight, transpose_y=True) if ctx.input_needs_gradient else None
        return grad_x, grad_weight, row_sum(rows)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x * cdf(x) with the cdf of the standard normal distribution."""
    return _Gelu.apply(x) if on_cpu(x) and not x.stop_gradient else F.gelu(x)


class _Gelu(PyLayer):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        cdf = paddle.scale(paddle.erf(x * math.sqrt(0.5)), 0.5, 0.5)
        ctx.save_for_backward(x, cdf)
        return x * cdf

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        x, cdf = ctx.saved_tensor()
        # (x * cdf)' = cdf + x * density, density = exp(-x^2/2) / sqrt(2 pi)
        slope = paddle.exp(paddle.scale(paddle.square(x), -0.5, -0.5 * math.log(2.0 * math.pi)))
        return slope.multiply_(x).add_(cdf).multiply_(gradient)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalises the last axis. x: [..., D], weight, bias: [D] -> [..., D]"""
    if on_cpu(x) and not x.stop_gradient:
        return _LayerNorm.apply(x, weight, bias, epsilon)
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


class _LayerNorm(PyLayer):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensor()
        dim = x.shape[-1]
        shape, x, gradient = x.shape, x.reshape([-1, dim]), gradient.reshape([-1, dim])
        normal = F.layer_norm(x, [dim], epsilon=ctx.epsilon)
        mean = paddle.full([dim, 1], 1.0 / dim, x.dtype)
        # With s = mean(x * normal) = var/std and std^2 = var + epsilon: std = (s + sqrt(s^2 + 4 epsilon))/2.
        s = paddle.matmul(x * normal, mean)
        std = 0.5 * (s + paddle.sqrt(s * s + 4.0 * ctx.epsilon))
        product = gradient * normal
        scaled = gradient * weight
        weighted_mean = weight.unsqueeze(1) * mean
        offset = paddle.matmul(gradient, weighted_mean)
        slope = paddle.matmul(product, weighted_mean)
        grad_x = (scaled - offset - normal * slope) / std
        return grad_x.reshape(shape), row_sum(product), row_sum(gradient)
