"""Operations whose Paddle kernels are slow on a CPU: the same values and gradients by faster means.

Elsewhere than in eager mode on a CPU each function is Paddle's own. What is slow there, in 2.6 and in 3.3: sums over
rows (a matrix product with ones is 25 times faster), with them the gradients of biases and of LayerNorm; log_softmax
and logsumexp over many classes; and the patch convolution.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer


def on_cpu(x: Tensor) -> bool:
    """Whether to take the means for a CPU; exported programs have Paddle's own operations."""
    return paddle.in_dynamic_mode() and x.place.is_cpu_place()


def sum_rows(x: Tensor) -> Tensor:
    """[N, D] -> [D], the sum over the rows."""
    return paddle.matmul(paddle.ones([1, x.shape[0]], x.dtype), x)[0] if on_cpu(x) else x.sum(0)


def sum_columns(x: Tensor) -> Tensor:
    """[N, D] -> [N, 1], the sum of each row."""
    return paddle.matmul(x, paddle.ones([x.shape[1], 1], x.dtype)) if on_cpu(x) else x.sum(1, keepdim=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum(targets * log_softmax(logits)) of each row. Both [N, K], targets without gradient -> [N]

    Exact, also where Paddle's CPU log_softmax clamps (64 below the largest logit), and linear in K, which that is not.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(PyLayer):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        largest = logits.max(-1, keepdim=True)
        exponentials = (logits - largest).exp_()
        total = sum_columns(exponentials)
        target_sum = sum_columns(targets)
        ctx.save_for_backward(exponentials, target_sum / total, targets)
        # = sum(targets) * logsumexp(logits) - targets . logits
        return (target_sum * (total.log() + largest) - sum_columns(targets * logits))[:, 0]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        exponentials, factor, targets = ctx.saved_tensor()
        gradient = gradient.unsqueeze(1)
        return exponentials * (factor * gradient) - targets * gradient


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., in_dim], weight: [in_dim, out_dim], bias: [out_dim] or None -> [..., out_dim]"""
    if on_cpu(x) and bias is not None:
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.needs_gradient = not x.stop_gradient, not weight.stop_gradient, not bias.stop_gradient
        in_dim, out_dim = weight.shape
        rows = paddle.addmm(bias.unsqueeze(0), x.reshape([-1, in_dim]), weight)
        return rows.reshape(x.shape[:-1] + [out_dim])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensor()
        in_dim, out_dim = weight.shape
        rows = gradient.reshape([-1, out_dim])
        for_x, for_weight, for_bias = ctx.needs_gradient
        return (
            paddle.matmul(gradient, weight, transpose_y=True) if for_x else None,
            paddle.matmul(x.reshape([-1, in_dim]), rows, transpose_x=True) if for_weight else None,
            sum_rows(rows) if for_bias else None,
        )


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
        ctx.needs_gradient = not weight.stop_gradient, not bias.stop_gradient
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensor()
        shape, dim = x.shape, x.shape[-1]
        x, gradient = x.reshape([-1, dim]), gradient.reshape([-1, dim])
        normal = F.layer_norm(x, [dim], epsilon=ctx.epsilon)
        product = gradient * normal
        # Rows are averaged, and columns [N, 1] and rows [1, D] are spread, by matrix products, which beat broadcasting.
        ones = paddle.ones([1, dim], x.dtype)
        mean = paddle.full([dim, 1], 1.0 / dim, x.dtype)
        weighted_mean = weight.unsqueeze(1) / dim
        # From m = mean(x * normal) = var/std and std^2 = var + epsilon follows std = (m + sqrt(m^2 + 4 epsilon))/2.
        m = paddle.matmul(x * normal, mean)
        inverse_std = 2.0 / (m + paddle.sqrt(m * m + 4.0 * ctx.epsilon))
        # (weight * gradient - mean(weight * gradient) - normal * mean(weight * product)) / std
        grad_x = gradient * paddle.matmul(inverse_std, weight.unsqueeze(0))
        grad_x = paddle.addmm(grad_x, inverse_std * paddle.matmul(gradient, weighted_mean), ones, alpha=-1.0)
        grad_x -= normal * paddle.matmul(inverse_std * paddle.matmul(product, weighted_mean), ones)
        for_weight, for_bias = ctx.needs_gradient
        return (
            grad_x.reshape(shape),
            sum_rows(product) if for_weight else None,
            sum_rows(gradient) if for_bias else None,
        )


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution whose stride is its size P. [B, C, H, W], weight: [D, C, P, P], bias: [D] -> [B, H/P * W/P, D]"""
    patch_size = weight.shape[-1]
    if not on_cpu(images):
        return F.conv2d(images, weight, bias, stride=patch_size).flatten(2).transpose([0, 2, 1])
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape([batch, channels, rows, patch_size, columns, patch_size])
    patches = patches.transpose([0, 2, 4, 1, 3, 5]).reshape([batch, rows * columns, -1])
    return linear(patches, weight.reshape([weight.shape[0], -1]).t(), bias)
