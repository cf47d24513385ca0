"""Operations whose Paddle kernels are slow on a CPU: the same values and gradients by faster means.

Elsewhere than in eager mode on a CPU each function is Paddle's own. What is slow there, in 2.6 and in 3.3: sums over
rows (a matrix product with ones is 25 times faster), with them the gradients of biases, scales and LayerNorm;
log_softmax and logsumexp over many classes; norms of large matrices; and the patch convolution.
"""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer


def on_cpu(x: Tensor) -> bool:
    """Whether to take the means for a CPU; exported programs have Paddle's own operations."""
    return paddle.in_dynamic_mode() and x.place.is_cpu_place()


def tensor_of(array: np.ndarray) -> Tensor:
    """`paddle.to_tensor(array)`, which in Paddle 3.3 leaves 100 bytes behind at each call: for what every step does."""
    if not paddle.in_dynamic_mode():
        return paddle.to_tensor(array)
    tensor = paddle.empty(array.shape, array.dtype.name)
    tensor.set_value(array)
    return tensor


def sum_rows(x: Tensor) -> Tensor:
    """[N, D] -> [D], the sum over the rows."""
    return paddle.matmul(paddle.ones([1, x.shape[0]], x.dtype), x)[0] if on_cpu(x) else x.sum(0)


def sum_columns(x: Tensor) -> Tensor:
    """[N, D] -> [N, 1], the sum of each row."""
    return paddle.matmul(x, paddle.ones([x.shape[1], 1], x.dtype)) if on_cpu(x) else x.sum(1, keepdim=True)


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """x: [..., in_dim], weight: [in_dim, out_dim], bias: [out_dim] or None -> [..., out_dim]"""
    if on_cpu(x) and bias is not None:
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def scale(x: Tensor, factors: Tensor) -> Tensor:
    """One factor per channel. x: [..., D], factors: [D] -> [..., D]"""
    return _Scale.apply(x, factors) if on_cpu(x) else x * factors


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


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """softmax(query . key / sqrt(d)) of value; each [B, N, heads, d] -> [B, N, heads, d]; mask: as below"""
    if mask is None and has_flash_attention(query):
        return F.scaled_dot_product_attention(query, key, value)
    mixed = paddle.matmul(attention_weights(query, key, mask), value.transpose([0, 2, 1, 3]))
    return mixed.transpose([0, 2, 1, 3])


def attention_weights(query: Tensor, key: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """softmax(query . key / sqrt(d)); each [B, N, heads, d] -> [B, heads, N, N]

    mask: [B, N], 0 for keys that get no weight (less than 1e-27, Paddle's softmax has no zeros).
    """
    query = query.transpose([0, 2, 1, 3]) * query.shape[-1] ** -0.5
    scores = paddle.matmul(query, key.transpose([0, 2, 1, 3]), transpose_y=True)
    if mask is not None:
        if mask.shape != key.shape[:2]:
            raise ValueError(f"mask ({list(mask.shape)}) must be [images, tokens], here {list(key.shape[:2])}")
        ignored = (mask == 0).unsqueeze([1, 2]).expand_as(scores)
        scores = paddle.where(ignored, paddle.full_like(scores, -math.inf), scores)
    return F.softmax(scores, axis=-1)


def has_flash_attention(x: Tensor) -> bool:
    """Half precision on a GPU that has the kernels (compute capability 8 or more)."""
    if not paddle.in_dynamic_mode() or not x.place.is_gpu_place():
        return False
    half = x.dtype in (paddle.float16, paddle.bfloat16)
    return half and paddle.device.cuda.get_device_capability() >= (8, 0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalises the last axis. x: [..., D], weight, bias: [D] -> [..., D]"""
    if on_cpu(x) and not x.stop_gradient:
        return _LayerNorm.apply(x, weight, bias, epsilon)
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def normalize(x: Tensor) -> Tensor:
    """Vectors along the last axis at length 1 (those shorter than 1e-12 stay short). [..., N] -> [..., N]"""
    if not on_cpu(x):
        return F.normalize(x, axis=-1)
    squares = paddle.matmul(x * x, paddle.ones([x.shape[-1], 1], x.dtype))
    return x * paddle.rsqrt(squares.clip(min=1e-24))


def weight_norm_linear(x: Tensor, direction: Tensor, gain: Tensor) -> Tensor:
    """x times the weight whose columns have the direction of `direction` [in_dim, K] and the length `gain` [K].

    x: [B, in_dim] -> [B, K]. Scaling the product is far cheaper than scaling the weight.
    """
    if on_cpu(x):
        return _WeightNormLinear.apply(x, direction, gain)
    product = paddle.matmul(x, direction)
    length = paddle.sqrt((direction * direction).sum(0))
    return product * (gain / length).astype(product.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum(targets * log_softmax(logits)) of each row. Both [N, K], targets without gradient -> [N]

    Exact, also where Paddle's CPU log_softmax clamps (64 below the largest logit), and linear in K, which that is not.
    """
    return _CrossEntropy.apply(logits, targets)


class _Function(PyLayer):
    """Base of the operations below: their backward gives a gradient to those inputs only that have one."""

    @staticmethod
    def remember(ctx, *inputs: Tensor) -> None:
        ctx.needed = [not x.stop_gradient for x in inputs]

    @staticmethod
    def gradients(ctx, *gradients: Optional[Tensor]) -> tuple:
        return tuple(gradient if needed else None for needed, gradient in zip(ctx.needed, gradients))


class _Linear(_Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        _Function.remember(ctx, x, weight, bias)
        in_dim, out_dim = weight.shape
        rows = paddle.addmm(bias.unsqueeze(0), x.reshape([-1, in_dim]), weight)
        return rows.reshape(x.shape[:-1] + [out_dim])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensor()
        in_dim, out_dim = weight.shape
        rows = gradient.reshape([-1, out_dim])
        grad_x = paddle.matmul(gradient, weight, transpose_y=True) if ctx.needed[0] else None
        grad_weight = paddle.matmul(x.reshape([-1, in_dim]), rows, transpose_x=True) if ctx.needed[1] else None
        return _Function.gradients(ctx, grad_x, grad_weight, sum_rows(rows))


class _Scale(_Function):
    @staticmethod
    def forward(ctx, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, factors)
        _Function.remember(ctx, x, factors)
        return x * factors

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, factors = ctx.saved_tensor()
        grad_factors = sum_rows((gradient * x).reshape([-1, factors.shape[0]]))
        return _Function.gradients(ctx, gradient * factors, grad_factors)


class _LayerNorm(_Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        _Function.remember(ctx, x, weight, bias)
        ctx.epsilon = epsilon
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensor()
        shape, dim = x.shape, x.shape[-1]
        x, gradient = x.reshape([-1, dim]), gradient.reshape([-1, dim])
        normal = F.layer_norm(x, [dim], epsilon=ctx.epsilon)
        product = gradient * normal
        # Matrix products average rows and spread [N, 1] and [1, D] to [N, D]: broadcasting is slower.
        ones = paddle.ones([1, dim], x.dtype)
        weighted_mean = weight.unsqueeze(1) / dim
        # From m = mean(x * normal) = var/std and std^2 = var + epsilon follows std = (m + sqrt(m^2 + 4 epsilon))/2.
        m = sum_columns(x * normal) / dim
        inverse_std = 2.0 / (m + paddle.sqrt(m * m + 4.0 * ctx.epsilon))
        # (weight * gradient - mean(weight * gradient) - normal * mean(weight * product)) / std
        grad_x = gradient * paddle.matmul(inverse_std, weight.unsqueeze(0))
        grad_x = paddle.addmm(grad_x, inverse_std * paddle.matmul(gradient, weighted_mean), ones, alpha=-1.0)
        grad_x -= normal * paddle.matmul(inverse_std * paddle.matmul(product, weighted_mean), ones)
        return _Function.gradients(ctx, grad_x.reshape(shape), sum_rows(product), sum_rows(gradient))


class _WeightNormLinear(_Function):
    """Made for the gradient of `direction`, which Paddle would collect in six passes over that large matrix."""

    @staticmethod
    def forward(ctx, x: Tensor, direction: Tensor, gain: Tensor) -> Tensor:
        product = paddle.matmul(x, direction)
        length = paddle.sqrt(sum_rows(direction * direction))
        ctx.save_for_backward(x, direction, gain, product, length)
        _Function.remember(ctx, x, direction, gain)
        return product * (gain / length)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, direction, gain, product, length = ctx.saved_tensor()
        grad_gain = sum_rows(gradient * product) / length
        gradient = gradient * (gain / length)
        # Through the product, less the part along the direction itself, which the division by the length cancels.
        along = (grad_gain * gain / (length * length)).unsqueeze(0)
        grad_direction = paddle.matmul(x, gradient, transpose_x=True)
        grad_direction -= paddle.matmul(paddle.ones([x.shape[1], 1], x.dtype), along).multiply_(direction)
        grad_x = paddle.matmul(gradient, direction, transpose_y=True)
        return _Function.gradients(ctx, grad_x, grad_direction, grad_gain)


class _CrossEntropy(_Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        largest = logits.max(-1, keepdim=True)
        exponentials = (logits - largest).exp_()
        total = sum_columns(exponentials)
        target_sum = sum_columns(targets)
        ctx.save_for_backward(exponentials, target_sum / total, targets)
        _Function.remember(ctx, logits, targets)
        # = sum(targets) * logsumexp(logits) - targets . logits
        return (target_sum * (total.log() + largest) - sum_columns(targets * logits))[:, 0]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        exponentials, factor, targets = ctx.saved_tensor()
        gradient = gradient.unsqueeze(1)
        return _Function.gradients(ctx, exponentials * (factor * gradient) - targets * gradient, None)
