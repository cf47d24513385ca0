"""Layer-wise learning rates: the deeper a layer lies below the output, the less it is changed.

As in BEiT (Bao et al. 2022), MAE and DINOv2: a backbone of n blocks has the layers 0 (what makes the tokens: patch
embedding or stem, positions, [CLS] and registers), 1 to n (the blocks) and n + 1 (the final norm, a classifier).
"""

from __future__ import annotations

import re

from paddle import nn

# The blocks of ViT, DINOv2 and region transformers; of XCiT, whose class attention follows its other blocks; of ResNet.
_BLOCKS = re.compile(r"(blocks|cls_attn_blocks|layer\d+)\.(\d+)\.")
_LAST = ("norm", "fc_norm", "fc", "head")


def has_blocks(backbone: nn.Layer) -> bool:
    """Whether the layers of ``backbone`` can have rates of their own."""
    return any(_BLOCKS.match(name) for name, _ in backbone.named_parameters())


def layer_numbers(backbone: nn.Layer) -> dict[str, int]:
    """The layer of each parameter of ``backbone`` by name: 0 below its n blocks, 1 to n in them, n + 1 behind them.

    Raises:
        ValueError: a backbone without blocks.
    """
    names = [name for name, _ in backbone.named_parameters()]
    blocks = [match.groups() if (match := _BLOCKS.match(name)) else None for name in names]
    # In the order of the forward pass, in which backbones define them.
    number_of = {block: number for number, block in enumerate(dict.fromkeys(filter(None, blocks)), start=1)}
    if not number_of:
        raise ValueError(
            f"{type(backbone).__name__} has no blocks (parameters named blocks.0., cls_attn_blocks.0. or layer1.0.), "
            "so its layers cannot have rates of their own: leave layer_decay at 1"
        )
    last = len(number_of) + 1
    return {
        name: number_of[block] if block else last if name.split(".")[0] in _LAST else 0
        for name, block in zip(names, blocks)
    }


def layer_rates(backbone: nn.Layer, decay: float) -> dict[str, float]:
    """The share of the learning rate of each parameter of ``backbone`` by name: ``decay ** (n + 1 - layer)`` with the
    n blocks and the layers of :func:`layer_numbers`. Block l, from 0, so has ``decay ** (n - l)``.

    Raises:
        ValueError: a decay that is not above 0 and at most 1, or a backbone without blocks.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay ({decay}) must be above 0 and at most 1, which means equal rates")
    if decay == 1:
        return {name: 1.0 for name, _ in backbone.named_parameters()}
    numbers = layer_numbers(backbone)
    last = 1 + max(number for name, number in numbers.items() if _BLOCKS.match(name))
    return {name: decay ** (last - number) for name, number in numbers.items()}
