"""Backbones that keep less for the backward pass: the inside of a block is computed a second time when it is needed.

Losses and weights are the same to the last bit; a step takes about a third longer. What a block needs for that: it may
draw random numbers (the generator is set back for the second time), and may hold passl's batch norms (their running
statistics move once). Names of the state, evaluation and export know nothing of it.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Union

import paddle
from paddle import nn

from passl import distributed
from passl.models.layers import BatchNorm1D, BatchNorm2D, repeating
from passl.models.method import Method

_COUNTING = (nn.BatchNorm, nn.BatchNorm1D, nn.BatchNorm2D, nn.BatchNorm3D, nn.SyncBatchNorm)


def recompute_blocks(method: Method, amount: Union[bool, int, float], interval: int = 1) -> int:
    """From now on the ``blocks`` of the trained backbone (DINO: the student's) are recomputed; returns how many.

    Args:
        amount: True for all blocks; a whole number of them, or a share between 0 and 1, from the first one on.
        interval: only every so manieth of these.

    Raises:
        ValueError: the backbone is frozen, has no such blocks or fewer, or their statistics would count twice.
    """
    backbone = method.backbones().get("student", method.backbone)
    name = type(backbone).__name__
    if all(parameter.stop_gradient for parameter in backbone.parameters()):
        raise ValueError(f"{type(method).__name__} trains no backbone, so there is nothing to recompute: remove it")
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.LayerList) or not len(blocks):
        raise ValueError(f"{name} has no list of blocks to recompute: remove it, or use a ViT or XCiT")
    for path, layer in blocks.named_sublayers():
        if isinstance(layer, _COUNTING) and not isinstance(layer, (BatchNorm1D, BatchNorm2D)):
            raise ValueError(
                f"blocks.{path} of {name} is Paddle's {type(layer).__name__}, whose running statistics would move "
                f"twice in each step: use passl.models.layers.BatchNorm2D, or remove recompute"
            )
    chosen = list(blocks)[: _count(amount, len(blocks))][::interval]
    distributed.expect_recompute(method)
    for block in chosen:
        block.forward = functools.partial(_forward, block, block.forward)
    return len(chosen)


def _count(amount: Union[bool, int, float], depth: int) -> int:
    if amount is True:
        return depth
    if isinstance(amount, float):
        return max(1, round(amount * depth))
    if amount > depth:
        raise ValueError(f"recompute ({amount}) is more than the backbone's {depth} blocks: true means all")
    return amount


def _forward(block: nn.Layer, forward: Callable[..., Any], *inputs: Any) -> Any:
    has_gradient = any(isinstance(x, paddle.Tensor) and not x.stop_gradient for x in inputs)
    if not (block.training and paddle.is_grad_enabled() and has_gradient):
        return forward(*inputs)
    return distributed.recompute(functools.partial(_counted_once, forward), *inputs)


def _counted_once(forward: Callable[..., Any], *inputs: Any) -> Any:
    # Paddle makes the first of the two calls without gradients.
    with repeating() if paddle.is_grad_enabled() else contextlib.nullcontext():
        return forward(*inputs)
