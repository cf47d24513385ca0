"""What a file holds, part by part, whoever wrote it: the names of tensors without the wrappings around them."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np

from passl import checkpoint
from passl.convert.report import ConversionError
from passl.formats.storage import BFLOAT16
from passl.formats.torch_reader import load_torch

TORCH_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".ckpt", ".bin", ".tar")
_SUFFIXES = (checkpoint.PARAMS, *TORCH_SUFFIXES)

# What wraps the names of tensors and says nothing: containers of a file, and PyTorch's own.
# Averaged copies are as good as what they are copies of: where a file has both, the user has to say which.
_WRAPPER = re.compile(
    r"(state_dict|model_state_dict|model|network|net|module|_orig_mod|_forward_module"
    r"|state_dict_ema|model_ema|ema_state_dict|ema)\."
)
# Everything in a file that is no weight of a network.
_ASIDE = re.compile(r"optimizer\w*|optim|(lr_)?schedulers?|\w*scaler|\w*rng_states?|callbacks|loops|hyper_parameters")
_NETWORK = re.compile(r"(student|teacher)\.")
_HEAD = re.compile(
    r"(?:backbone\.)?(head|projection_head|dino_head|ibot_head|mlp_head|projector)\.(?=(mlp|last_layer|layers|\d+)\.)"
)
_BACKBONE = re.compile(r"(backbone|encoder|vit|trunk)\.")
_CENTER = re.compile(r"(?:(?:dino_)?(?:loss|criterion)\.)?center$")
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
    others: tuple[str, ...] = ()  # keys of further tensors of the file that are in the value

    @property
    def family(self) -> str:
        """A pattern of the keys that are wrapped as this one is."""
        wrapping = self.key[: -len(self.name)] if self.key.endswith(self.name) else ""
        return f"{wrapping}*" if wrapping else self.key


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

    @property
    def is_clemsgrs(self) -> bool:
        """Whether it is a run of clemsgrs on one process: theirs has no arguments, and no DistributedDataParallel.

        Neither has passl's own, which is in Paddle's layout.
        """
        if self.layout != "torch":
            return False
        keys = {"student", "teacher", "dino_loss"}
        bare = all(not entry.key.startswith("student.module.") for entry in self.entries)
        return {entry.key.partition(".")[0] for entry in self.entries} == keys and "args" not in self.aside and bare

    def networks(self) -> list[str]:
        return list(dict.fromkeys(entry.network for entry in self.entries if entry.network))

    def parts(self, network: str) -> dict[str, dict[str, Entry]]:
        """part -> name -> entry, for what belongs to ``network``."""
        parts: dict[str, dict[str, Entry]] = {}
        for entry in self.entries:
            if entry.network == network:
                parts.setdefault(entry.part, {})[entry.name] = entry
        return parts

    def leave_out_copies(self, patterns: Sequence[str]) -> list[str]:
        """Of tensors that the file has twice, drop those that one of ``patterns`` names; their keys.

        Raises:
            ConversionError: both of two are left.
        """
        kept: dict[tuple[str, str, str], Entry] = {}
        dropped = []
        counts = Counter(entry[1:4] for entry in self.entries)
        for entry in self.entries:
            place = entry[1:4]
            if counts[place] > 1 and any(fnmatchcase(entry.key, pattern) for pattern in patterns):
                dropped.append(entry.key)
                continue
            if place in kept:
                first, second = kept[place], entry
                raise ConversionError(
                    f"the file has {entry.name} twice, as {first.key} and {second.key}: leave out one set of weights "
                    f"with --allow '{second.family}' or --allow '{first.family}'"
                )
            kept[place] = entry
        self.entries = list(kept.values())
        return dropped


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
        is_folder = os.path.isdir(text)
        folder = Path(text) if is_folder else Path(text).parent
        there = sorted(p.name for p in folder.glob("*") if p.name.endswith(_SUFFIXES))[:8] if folder.is_dir() else []
        rest = f"the folder has {', '.join(there) or 'no file of weights'}" if folder.is_dir() else f"nor is {folder}"
        tried = "" if text.endswith(_SUFFIXES) else f" (tried {', '.join(_SUFFIXES)})"
        problem = "a folder, where a file or prefix is expected" if is_folder else f"no such file{tried}"
        raise ConversionError(f"{text}: {problem}; {rest}")
    return Path(found[0])


def stem(path: Path) -> str:
    """The name of a file of weights without its suffix: of ``a.b.pth.tar``, ``a.b``."""
    suffix = max((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), key=len, default="")
    return path.name[: len(path.name) - len(suffix)]


def open_source(path: Union[str, Path], bfloat16: str = "float32") -> Source:
    """Read a file of weights of any known origin; ``path`` may be a prefix.

    bfloat16: "float32", or "bits" for arrays of type ``BFLOAT16``.

    Raises:
        CheckpointFormatError, CheckpointError: it is missing, damaged, or holds no weights.
    """
    path = find_file(path)
    if path.name.endswith(checkpoint.PARAMS):
        state = checkpoint.read_weights(path, widen=bfloat16 == "float32")
        bits = {name: value.view(BFLOAT16) for name, value in state.items() if value.dtype == np.uint16}
        return _sorted_out(path, "paddle", {**state, **bits})
    return _sorted_out(path, "torch", load_torch(path, bfloat16=bfloat16))


def _sorted_out(path: Path, layout: str, value: Any) -> Source:
    if not isinstance(value, Mapping):
        raise ConversionError(f"{path}: holds {_kind(value)}, where a state dict (name -> tensor) is expected")
    aside = {key: item for key, item in value.items() if _is_aside(key, item, value)}
    entries = [_entry(key, tensor) for key, tensor in _flat({k: v for k, v in value.items() if k not in aside})]
    if not entries:
        raise ConversionError(f"{path}: holds no tensors, only {', '.join(map(str, value)) or 'nothing'}")
    return Source(path, layout, entries, aside)


def _is_aside(key: Any, item: Any, siblings: Mapping) -> bool:
    if _ASIDE.fullmatch(str(key)) or not _has_tensors(item):
        return True
    # A best accuracy, say, beside the state dict.
    is_number = isinstance(item, np.ndarray) and item.ndim == 0
    return is_number and any(isinstance(other, Mapping) and _has_tensors(other) for other in siblings.values())


def _entry(key: str, value: np.ndarray) -> Entry:
    name, network = _unwrapped(key), ""
    if match := _NETWORK.match(name):
        network, name = match[1], _unwrapped(name[match.end() :])
    if _CENTER.match(name):
        return Entry(key, "", "center", "center", value)
    if match := _HEAD.match(name):
        part = match[1] if match[1] in ("dino_head", "ibot_head") else "head"
        return Entry(key, network, part, _head_name(name[match.end() :]), value)
    bare = _without(_BACKBONE, name)
    for pattern, part in ((_PROBE, "probe"), (_CONCATENATED, "concatenated"), (_CLASSIFIER, "classifier")):
        if match := pattern.match(bare):
            return Entry(key, network, part, bare[match.end() :], value)
    return Entry(key, network, "backbone", _unwrapped(bare), value)


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


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """All arrays in nested containers, under keys that are joined by dots."""
    if isinstance(value, np.ndarray):
        yield prefix, value
        return
    for key, item in _items(value):
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))


def _has_tensors(value: Any) -> bool:
    return isinstance(value, np.ndarray) or any(_has_tensors(item) for _, item in _items(value))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _kind(value: Any) -> str:
    return "an argparse.Namespace" if isinstance(value, argparse.Namespace) else f"a {type(value).__name__}"
