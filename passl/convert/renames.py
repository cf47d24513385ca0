"""Other projects' names of a backbone's tensors -> the official ones, which are passl's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from passl.convert.source import Entry

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
# timm's XCiT has three layers where the official one has a single one.
_QUERY = re.compile(r"(cls_attn_blocks\.\d+\.attn\.)q\.(weight|bias)")


def official(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a backbone or head under their official names, in the order of the file.

    Values change for two of timm's networks only: XCiT (three tensors become one), and ViTs without a position of
    [CLS].
    """
    renamed: dict[str, Entry] = {}
    is_gated = _is_gated(entries)
    for name, entry in entries.items():
        new = name
        for pattern, replacement in _RULES:
            new = pattern.sub(replacement, new)
        if is_gated:
            for there, here in _SWIGLU.items():
                new = new.replace(there, here)
        # A rule met a name that is there already: the second stays as it is, and is reported.
        renamed[name if new in renamed else new] = entry
    _join_queries(renamed)
    _add_cls_position(renamed)
    return renamed


def _is_gated(entries: Mapping[str, Entry]) -> bool:
    """timm's SwiGLU: the first of two layers makes twice what the second takes."""
    first, second = entries.get("blocks.0.mlp.fc1.bias"), entries.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and first.value.size == 2 * max(second.value.shape[1:], default=0)


def _join_queries(renamed: dict[str, Entry]) -> None:
    for match in [match for name in renamed if (match := _QUERY.fullmatch(name))]:
        names = [f"{match[1]}{part}.{match[2]}" for part in "qkv"]
        parts = [renamed[name] for name in names if name in renamed]
        if len({part.value.shape for part in parts}) == 1 and len(parts) == 3 and parts[0].value.ndim:
            joined = np.concatenate([part.value for part in parts])
            others = tuple(part.key for part in parts[1:])
            renamed[f"{match[1]}qkv.{match[2]}"] = parts[0]._replace(value=joined, others=others)
            for name in names:
                del renamed[name]


def _add_cls_position(renamed: dict[str, Entry]) -> None:
    """Some of timm's ViTs add the position of [CLS] to the token itself; the official model adds it in every call."""
    entry = renamed.get("pos_embed")
    if entry is None or entry.value.ndim != 3 or "cls_token" not in renamed:
        return
    positions = entry.value.shape[1]
    if positions > 1 and math.isqrt(positions) ** 2 == positions:
        nothing = np.zeros_like(entry.value[:, :1])
        renamed["pos_embed"] = entry._replace(value=np.concatenate([nothing, entry.value], axis=1))
