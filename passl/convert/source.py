"""What a file holds, part by part, whoever wrote it: the names of tensors without the wrappings around them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np

from passl import checkpoint
from passl.convert.report import ConversionError
from passl.convert.torch_reader import load_torch

TORCH_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".ckpt", ".bin", ".tar")
_SUFFIXES = (checkpoint.PARAMS, *TORCH_SUFFIXES)

# What wraps the names of tensors and says nothing: containers of a file, and PyTorch's own.
_WRAPPER = re.compile(r"(state_dict|model_state_dict|model|network|net|module|_orig_mod|_forward_module)\.")
# Everything in a file that is no weight of a network.
_ASIDE = ("optimizer", "optimizer_states", "lr_schedulers", "scheduler", "fp16_scaler", "callbacks", "loops")
_NETWORK = re.compile(r"(student|teacher)\.")
_HEAD = re.compile(
    r"(?:backbone\.)?(head|projection_head|dino_head|ibot_head|mlp_head|projector)\.(?=(mlp|last_layer|layers|\d+)\.)"
)
_BACKBONE = re.compile(r"(backbone|encoder|vit|trunk)\.")
# A linear classifier: a probe's own, DINOv2's, and those at the end of networks trained with labels.
_PROBE = re.compile(r"(?:linear\.linear|linear)\.(?=(weight|bias)$)")
_CONCATENATED = re.compile(r"(?:linear_head\.|^)(?=(weight|bias)$)")
_CLASSIFIER = re.compile(r"(?:head\.fc|head|fc|classifier)\.(?=(weight|bias)$)")


class Entry(NamedTuple):
    """A tensor: its full key in the file, the part that it belongs to, its name there, and its numbers."""

    key: str
    network: str  # "student", "teacher", or ""
    part: str  # "backbone", "head", "dino_head", "ibot_head", "center", "probe", "concatenated", "classifier"
    name: str
    value: np.ndarray


@dataclass
class Source:
    """A file of weights, opened.

    layout: "torch", or "paddle" where Linear weights are [in, out] already.
    aside: what else is in the file: epoch, args, optimizer ...
    """

    path: Path
    layout: str
    entries: list[Entry]
    aside: dict[str, Any] = field(default_factory=dict)

    def networks(self) -> list[str]:
        return list(dict.fromkeys(entry.network for entry in self.entries if entry.network))

    def parts(self, network: str) -> dict[str, dict[str, Entry]]:
        """part -> name -> entry, for what belongs to ``network``."""
        parts: dict[str, dict[str, Entry]] = {}
        for entry in self.entries:
            if entry.network == network:
                known = parts.setdefault(entry.part, {})
                if entry.name in known:
                    raise ConversionError(f"{known[entry.name].key} and {entry.key} are the same tensor: {entry.name}")
                known[entry.name] = entry
        return parts


def find_file(path: Union[str, Path]) -> Path:
    """``path``, or what is there under this prefix with a suffix of Paddle's, safetensors' or PyTorch's files.

    Raises:
        ConversionError: nothing of that name is there.
    """
    text = os.path.expanduser(path)
    if text.endswith(_SUFFIXES) or os.path.isfile(text):
        found = [text]
    else:
        found = [text + suffix for suffix in _SUFFIXES if os.path.isfile(text + suffix)]
    if not found or not os.path.isfile(found[0]):
        folder = Path(text).parent
        there = sorted(p.name for p in folder.glob("*") if p.name.endswith(_SUFFIXES))[:8] if folder.is_dir() else []
        rest = f"the folder has {', '.join(there) or 'no file of weights'}" if folder.is_dir() else f"nor is {folder}"
        tried = "" if text.endswith(_SUFFIXES) else f" (tried {', '.join(_SUFFIXES)})"
        raise ConversionError(f"{text}: no such file{tried}; {rest}")
    return Path(found[0])


def open_source(path: Union[str, Path], bfloat16: str = "float32") -> Source:
    """Read a file of weights of any known origin; ``path`` may be a prefix.

    Raises:
        CheckpointFormatError, CheckpointError: it is missing, damaged, or holds no weights.
    """
    path = find_file(path)
    if path.name.endswith(checkpoint.PARAMS):
        return _sorted_out(path, "paddle", checkpoint.read_weights(path))
    return _sorted_out(path, "torch", load_torch(path, bfloat16=bfloat16))


def _sorted_out(path: Path, layout: str, value: Any) -> Source:
    if not isinstance(value, Mapping):
        raise ConversionError(f"{path}: holds {_kind(value)}, where a state dict (name -> tensor) is expected")
    aside = {key: item for key, item in value.items() if key in _ASIDE or not _has_tensors(item)}
    rest = {key: item for key, item in value.items() if key not in aside}
    entries = [_entry(key, tensor) for key, tensor in _flat(rest)]
    if not entries:
        raise ConversionError(f"{path}: holds no tensors, only {', '.join(map(str, value)) or 'nothing'}")
    return Source(path, layout, entries, aside)


def _entry(key: str, value: np.ndarray) -> Entry:
    name, network = _unwrapped(key), ""
    if match := _NETWORK.match(name):
        network, name = match[1], _unwrapped(name[match.end() :])
    if name in ("dino_loss.center", "center"):
        return Entry(key, network, "center", "center", value)
    if match := _HEAD.match(name):
        part = match[1] if match[1] in ("dino_head", "ibot_head") else "head"
        return Entry(key, network, part, _head_name(name[match.end() :]), value)
    for pattern, part in ((_PROBE, "probe"), (_CONCATENATED, "concatenated"), (_CLASSIFIER, "classifier")):
        if match := pattern.match(_without(_BACKBONE, name)):
            return Entry(key, network, part, _without(_BACKBONE, name)[match.end() :], value)
    return Entry(key, network, "backbone", _unwrapped(_without(_BACKBONE, name)), value)


def _unwrapped(name: str) -> str:
    while match := _WRAPPER.match(name):
        name = name[match.end() :]
    return name


def _without(pattern: re.Pattern, name: str) -> str:
    match = pattern.match(name)
    return name[match.end() :] if match else name


def _head_name(name: str) -> str:
    """A DINO head's tensor under its official name, whatever the MLP is called, and with PyTorch 2's weight norm."""
    name = re.sub(r"^(?:layers\.)?(\d+)\.", r"mlp.\1.", name)
    name = name.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
    return name.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")


def _flat(value: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif isinstance(item, np.ndarray):
            yield f"{prefix}{key}", item


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(item) for item in value.values())
    return isinstance(value, np.ndarray)


def _kind(value: Any) -> str:
    return "an argparse.Namespace" if isinstance(value, argparse.Namespace) else f"a {type(value).__name__}"
