"""Other projects' names of a backbone's tensors -> the official ones, which are passl's."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

_RULES = (
    # DINOv2 trains in chunks of blocks; the second number counts through all of them.
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),
    # timm
    (re.compile(r"^reg_token$"), "register_tokens"),
    (re.compile(r"^pos_embed\.token_projection\."), "pos_embeder.token_projection."),
    # Paddle's running statistics
    (re.compile(r"(^|\.)_mean$"), r"\1running_mean"),
    (re.compile(r"(^|\.)_variance$"), r"\1running_var"),
)
_SWIGLU = {"mlp.fc1.": "mlp.w12.", "mlp.fc2.": "mlp.w3."}


class Renamed(NamedTuple):
    """Official names -> tensors, and official names -> names before."""

    values: dict[str, np.ndarray]
    before: dict[str, str]


def official(values: dict[str, np.ndarray]) -> Renamed:
    """The tensors of a backbone under their official names; values are changed for timm's ViTs with registers only."""
    renamed: dict[str, np.ndarray] = {}
    before: dict[str, str] = {}
    gated = _is_gated(values)
    for name, value in values.items():
        new = name
        for pattern, replacement in _RULES:
            new = pattern.sub(replacement, new)
        if gated:
            for there, here in _SWIGLU.items():
                new = new.replace(there, here)
        if new in renamed:  # a rule met a name that is there already: leave the second as it is, to be reported
            new = name
        renamed[new], before[new] = value, name
    if "reg_token" in before.values() and _lacks_cls_position(renamed):
        # timm adds the position of [CLS] to the token itself; the official model adds it in every call.
        positions = renamed["pos_embed"]
        renamed["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return Renamed(renamed, before)


def _is_gated(values: dict[str, np.ndarray]) -> bool:
    """timm's SwiGLU: the first of two layers makes twice what the second takes."""
    first, second = values.get("blocks.0.mlp.fc1.bias"), values.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]


def _lacks_cls_position(values: dict[str, np.ndarray]) -> bool:
    side = round(np.sqrt(values["pos_embed"].shape[1])) if "pos_embed" in values else 0
    return side > 0 and side * side == values["pos_embed"].shape[1]
