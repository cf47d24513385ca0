"""The original of a conversion, run by PyTorch. Imports PyTorch: only :mod:`passl.convert.verify` imports this."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passl import checkpoint
from passl.convert import torch_forward
from passl.convert.conversion import Conversion
from passl.convert.report import ConversionError
from passl.convert.to_torch import state_dict
from passl.convert.verify import HEADS, float_array, is_concatenated, networks

_LINEAR = re.compile(r"(?:^|\.)((?:linear|linear_head|head|fc|classifier)\.)weight$|^weight$")
_NETWORK = re.compile(r"(?:^|\.)(student\.|teacher\.)")

State = dict[str, Tensor]


def original(
    files: list[Path], conversion: Conversion, unseen: Mapping[str, Any]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function from an input to the outputs of the network in ``files``, by the names that passl has for its parts.

    Raises:
        ConversionError: a file cannot be read by PyTorch, has other tensors than the conversion, or is of no network
            that is known here.
    """
    if files[0].name.endswith(checkpoint.PARAMS):
        # No PyTorch in the beginning: then the weights are verified that `--to torch` writes.
        state = {k: torch.from_numpy(np.ascontiguousarray(float_array(v))) for k, v in state_dict(conversion).items()}
    else:
        state = _read(files, set(conversion.report.matched))
    side = _Original(state, conversion, torch_forward.Unseen(**unseen))

    @torch.no_grad()
    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return {name: value.numpy() for name, value in side.outputs(torch.from_numpy(x)).items()}
        except KeyError as error:
            raise ConversionError(
                f"PyTorch's side finds no tensor {error} in {files[0]}: give --verify RECORDED.npz"
            ) from error

    return run


class _Original:
    def __init__(self, state: State, conversion: Conversion, unseen: torch_forward.Unseen) -> None:
        self.state, self.conversion, self.unseen = state, conversion, unseen

    def outputs(self, x: Tensor) -> State:
        kind = self.conversion.kind
        if kind == "linear":
            return {"linear": self._linear(x)}
        if kind == "probe":
            return {"probe": self._linear(self._features(x))}
        outputs = {}
        for network in networks(self.conversion) if kind != "backbone" else [""]:
            state = {key: value for key, value in self.state.items() if network in ("", _network(key))}
            outputs[f"{network}backbone"] = features = self._backbone(state, x)
            for part in (part for part in HEADS if part in self.conversion.model):
                several = sum(name in self.conversion.model for name in HEADS) > 1
                own = {k: v for k, v in state.items() if f".{part}." in f".{k}"} if several else state
                outputs[f"{network}{part}"] = torch_forward.dino_head(own, features)
        return outputs

    def _backbone(self, state: State, x: Tensor) -> Tensor:
        output = torch_forward.backbone(state, x, self.unseen)
        if output is None:
            raise ConversionError(
                f"no PyTorch original of {self.conversion.architecture} is known here: give --verify RECORDED.npz"
            )
        return output

    def _linear(self, features: Tensor) -> Tensor:
        name, _ = self._linear_name()
        return torch.nn.functional.linear(features, self.state[f"{name}weight"], self.state[f"{name}bias"])

    def _linear_name(self) -> tuple[str, str]:
        """The classifier's prefix in the file, and the last part of it."""
        for key in self.state:
            if match := _LINEAR.search(key):
                return key[: -len("weight")], match[1] or ""
        raise ConversionError("the classifier was not found in the original: give --verify RECORDED.npz")

    def _features(self, images: Tensor) -> Tensor:
        """What the classifier sees, in the order of the project that it comes from."""
        blocks = self.conversion.model["n_last_blocks"]
        tokens = torch_forward.transformer(self.state, images, self.unseen, blocks)
        if tokens is None or self._linear_name()[1] in ("head.", "fc.", "classifier."):
            return self._backbone(self.state, images)
        cls_tokens = [x[:, 0] for x in tokens]
        mean = tokens[-1][:, 1:].mean(dim=1)
        if is_concatenated(self.conversion):
            return torch.cat([*cls_tokens, mean], dim=-1)
        features = torch.cat(cls_tokens, dim=-1)
        if not self.conversion.model["avgpool"]:
            return features
        return torch.stack([features, mean], dim=-1).reshape(len(images), -1)


def _network(key: str) -> str:
    match = _NETWORK.search(key)
    return match[1] if match else ""


def _read(files: list[Path], wanted: set[str]) -> State:
    """The tensors that were converted, by their full names in the files."""
    tensors = dict(item for path in files for item in _flat(_load(path)))
    if lacking := wanted - set(tensors):
        raise ConversionError(f"PyTorch finds no {', '.join(sorted(lacking)[:5])} in {files[0]}")
    return {key: tensors[key].float() for key in wanted}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ConversionError(f"{path}: PyTorch needs another package for it: pip install safetensors") from error
        return load_file(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            with torch.serialization.safe_globals(_plain_data()):
                return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, AttributeError) as error:  # the last: before PyTorch 2.5
        found = re.search(r"Unsupported \w+: .*?(?= was not|$)", str(error), re.MULTILINE)
        reason = found[0] if found else str(error).strip().partition("\n")[0]
        raise ConversionError(f"{path}: PyTorch refuses it ({reason}): give --verify RECORDED.npz") from error


def _plain_data() -> list[Any]:
    """What official checkpoints hold beside tensors, and ``weights_only`` refuses: arguments and numbers of numpy.

    passl's reader has read the file before this, and takes no more than these.
    """
    scalar = np.float64(0.0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, *names, np.dtype, *(type(np.dtype(code)) for code in "?bhilBefd")]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif isinstance(item, Tensor):
            yield f"{prefix}{key}", item
