"""``passl-convert --verify``: what the converted weights compute, beside PyTorch with the original or a recording."""

from __future__ import annotations

import inspect
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np
import paddle
from paddle import nn

from passl import checkpoint
from passl.convert.conversion import Conversion
from passl.convert.report import ConversionError
from passl.convert.source import find_file
from passl.formats.storage import BFLOAT16
from passl.models.dino import DINOHead
from passl.models.probe import LinearClassifier, LinearProbe
from passl.registry import BACKBONES

# Of the largest output. Both sides add up float32 numbers in different orders, which makes 1e-7 to 1e-5; a wrong name,
# layout or argument makes 1e-3 and more.
TOLERANCE = 1e-4

HEADS = ("head", "dino_head", "ibot_head")
_OUTPUTS = ("output", "forward")

PathLike = Union[str, Path]


class Sample(NamedTuple):
    """An input, and what the original makes of it: outputs by the name of the part that they leave."""

    input: np.ndarray
    outputs: dict[str, np.ndarray]


def verify(
    source: PathLike, conversion: Conversion, recorded: Optional[PathLike] = None, backbone: Optional[PathLike] = None
) -> list[str]:
    """Compare the outputs of converted weights, in float32 on a CPU, with those of the original.

    Args:
        source, backbone: the files that ``conversion`` was made from.
        recorded: a ``.npz`` with arrays ``input`` (or ``input_u8``, bytes for value * 2**-6 - 2) and ``output`` (or
            ``forward``); several pairs as ``NAME/input`` and ``NAME/output``. Inputs are what the network takes: images
            [B, C, H, W], or for a linear classifier features. Outputs are those of the backbone (of a run: of the
            teacher's), or logits. None: the original file is run with PyTorch, on inputs that are always the same.

    Returns lines for people: what was compared, and how far apart it is.

    Raises:
        ConversionError: the outputs differ by more than TOLERANCE of the largest, or cannot be compared.
    """
    if conversion.architecture and "num_heads" in conversion.architecture.unknown:
        raise ConversionError("num_heads is not visible in the file, and outputs depend on it: give --set num_heads=N")
    with _on_cpu():
        models = _models(conversion)
        unseen = _unseen(models)
        if recorded is not None:
            origin, samples = Path(recorded).name, _recorded(Path(recorded).expanduser(), models)
        else:
            files = [find_file(path) for path in (source, backbone) if path]
            origin, samples = _from_torch(files, conversion, _inputs(conversion, models), unseen)
        blocks = conversion.model["n_last_blocks"] if conversion.kind == "linear" and is_concatenated(conversion) else 0
        run = partial(_outputs, models, interleaved_blocks=blocks)
        return _compared(run, samples, origin, unseen)


@contextmanager
def _on_cpu() -> Iterator[None]:
    """GPUs may compute with ten bits."""
    device = paddle.get_device()
    paddle.set_device("cpu")
    try:
        with paddle.no_grad():
            yield
    finally:
        paddle.set_device(device)


# --- our side --------------------------------------------------------------------------------------------------------


def networks(conversion: Conversion) -> list[str]:
    """The prefixes of the networks in a conversion: "student." and "teacher.", one of them, or ""."""
    found = {slot.name.partition(".")[0] for slot in conversion.layout}
    return [f"{name}." for name in ("student", "teacher") if name in found] or [""]


def _models(conversion: Conversion) -> dict[str, nn.Layer]:
    """The converted Layers by name; a backbone comes before its heads."""
    if conversion.kind == "linear":
        arguments = {key: conversion.model[key] for key in ("in_dim", "num_classes")}
        return {"linear": _loaded(partial(LinearClassifier, **arguments), conversion, "linear.")}
    assert conversion.architecture is not None
    build = partial(BACKBONES.get(conversion.architecture.name), **conversion.architecture.arguments)
    if conversion.kind == "backbone":
        return {"backbone": _loaded(build, conversion, "")}
    if conversion.kind == "probe":
        arguments = {key: conversion.model[key] for key in ("num_classes", "n_last_blocks", "avgpool")}
        return {"probe": _loaded(partial(LinearProbe, build, **arguments), conversion, "")}
    models = {}
    for network in networks(conversion):
        models[f"{network}backbone"] = backbone = _loaded(build, conversion, f"{network}backbone.")
        for part in (part for part in HEADS if part in conversion.model):
            arguments = {key: value for key, value in conversion.model[part].items() if key != "name"}
            head = partial(DINOHead, backbone.embed_dim, **arguments)
            models[f"{network}{part}"] = _loaded(head, conversion, f"{network}{part}.")
    return models


def _loaded(build: Callable[[], nn.Layer], conversion: Conversion, prefix: str) -> nn.Layer:
    layer = build()
    state = conversion.state.items()
    part = {name[len(prefix) :]: float_array(value) for name, value in state if name.startswith(prefix)}
    checkpoint.load_weights(layer, part, f"the converted {prefix[:-1] or 'weights'}")
    layer.eval()
    return layer


def float_array(value: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, everything else as it is."""
    if value.dtype != BFLOAT16:
        return value
    return (np.ascontiguousarray(value)["bfloat16"].astype(np.uint32) << 16).view(np.float32)


def _outputs(models: Mapping[str, nn.Layer], x: np.ndarray, interleaved_blocks: int = 0) -> dict[str, np.ndarray]:
    """interleaved_blocks: of DINOv2's features for a linear classifier, else 0."""
    outputs: dict[str, paddle.Tensor] = {}
    for name, layer in models.items():
        if isinstance(layer, DINOHead):
            outputs[name] = layer(outputs[f"{name.rpartition('.')[0]}.backbone".lstrip(".")])
        elif isinstance(layer, LinearProbe):
            outputs[name] = layer.predict(paddle.to_tensor(x))
        else:
            outputs[name] = layer(paddle.to_tensor(_interleaved(x, interleaved_blocks) if interleaved_blocks else x))
    return {name: value.numpy() for name, value in outputs.items()}


def _interleaved(features: np.ndarray, blocks: int) -> np.ndarray:
    """DINOv2's features [B, cls_1 .. cls_n, mean] in the order of passl's probe."""
    parts = np.split(features, blocks + 1, axis=1)
    return np.concatenate([*parts[:-2], np.stack(parts[-2:], axis=2).reshape(len(features), -1)], axis=1)


def is_concatenated(conversion: Conversion) -> bool:
    """Whether it has one of DINOv2's linear classifiers, with the mean of the patches behind all [CLS]."""
    return any(key == "weight" or key.endswith("linear_head.weight") for key in conversion.report.matched)


def _unseen(models: Mapping[str, nn.Layer]) -> dict[str, Any]:
    """What outputs depend on and no name or shape shows: both sides take it from the arguments."""
    layer = next(iter(models.values()))
    layer = getattr(layer, "backbone", layer)
    unseen = {}
    if hasattr(layer, "blocks") and hasattr(layer, "norm"):
        unseen = {"num_heads": layer.blocks[0].attn.num_heads, "epsilon": layer.norm.epsilon}
    if hasattr(layer, "pos_embed_mode"):
        unseen["pos_embed_mode"] = layer.pos_embed_mode
    if hasattr(layer, "cls_attn_blocks"):
        unseen["tokens_norm"] = layer.cls_attn_blocks[0].tokens_norm
    return unseen


# --- the other side --------------------------------------------------------------------------------------------------


def _inputs(conversion: Conversion, models: Mapping[str, nn.Layer]) -> list[np.ndarray]:
    """Images of the size that the network was made for and of a rectangular one; features for a linear classifier."""
    random = np.random.default_rng(0)
    if conversion.kind == "linear":
        return [random.standard_normal((2, conversion.model["in_dim"]), np.float32)]
    assert conversion.architecture is not None
    accepted = inspect.signature(BACKBONES.get(conversion.architecture.name)).parameters
    usual = accepted["in_chans"].default if "in_chans" in accepted else 3
    channels = conversion.architecture.arguments.get("in_chans", usual)
    layer = next(iter(models.values()))
    layer = getattr(layer, "backbone", layer)
    patch, side = 16, 14
    if hasattr(layer, "pos_embed"):
        patch, side = layer.patch_size, math.isqrt(layer.pos_embed.shape[1] - 1)
    sizes = ((side, side), (6, 8))
    return [random.standard_normal((2, channels, rows * patch, cols * patch), np.float32) for rows, cols in sizes]


def _from_torch(
    files: list[Path], conversion: Conversion, inputs: list[np.ndarray], unseen: Mapping[str, Any]
) -> tuple[str, Iterator[Sample]]:
    try:
        import torch

        from passl.convert import torch_side
    except ImportError as error:
        raise ConversionError(
            f"--verify runs the original with PyTorch, which is not here ({error}): pip install torch, or give "
            "--verify RECORDED.npz with arrays 'input' and 'output'"
        ) from error
    run = torch_side.original(files, conversion, unseen)
    return f"PyTorch {torch.__version__}", (Sample(x, run(x)) for x in inputs)


def _recorded(path: Path, models: Mapping[str, nn.Layer]) -> Iterator[Sample]:
    if path.suffix != ".npz":
        raise ConversionError(f"--verify {path}: a recording is a .npz file (write --verify alone after SRC and DST)")
    compared = [name for name, layer in models.items() if not isinstance(layer, DINOHead)][-1]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.rpartition("/")[2] in ("input", "input_u8")]
            if not names:
                raise ConversionError(f"{path}: has no array 'input' or 'NAME/input', only {', '.join(arrays.files)}")
            for name in names:
                folder = name.rpartition("/")[0]
                outputs = [f"{folder}/{output}".lstrip("/") for output in _OUTPUTS]
                found = next((output for output in outputs if output in arrays), None)
                if found is None:
                    raise ConversionError(f"{path}: has {name} without {' or '.join(outputs)}")
                x = arrays[name].astype(np.float32)
                yield Sample(x * 2.0**-6 - 2.0 if name.endswith("_u8") else x, {compared: arrays[found]})
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path}: no readable recording ({error})") from error


# --- the comparison --------------------------------------------------------------------------------------------------


def _compared(
    run: Callable[[np.ndarray], dict[str, np.ndarray]],
    samples: Iterable[Sample],
    origin: str,
    unseen: Mapping[str, Any],
) -> list[str]:
    lines, failures = [], []
    assumed = ", ".join(f"{key}={value}" for key, value in unseen.items())
    for sample in samples:
        shape = " x ".join(map(str, sample.input.shape))
        try:
            ours = run(sample.input)
        except ValueError as error:
            raise ConversionError(f"the converted network refuses an input of {shape}: {error}") from error
        for name, theirs in sample.outputs.items():
            if ours[name].shape != theirs.shape:
                raise ConversionError(
                    f"the {name} makes {list(ours[name].shape)} of an input of {shape}, and {origin} has "
                    f"{list(theirs.shape)}"
                )
            if not theirs.any():
                raise ConversionError(
                    f"all outputs of the {name} are 0 in {origin}: they say nothing about the weights"
                )
            difference, limit = np.abs(ours[name] - theirs).max(), TOLERANCE * np.abs(theirs).max()
            line = f"verify: {name}, input {shape}: largest difference to {origin} {difference:.1e} ({{}} {limit:.1e})"
            # Not `>`: a NaN on either side must fail.
            if not difference <= limit:
                failures.append(line.format("too much: tolerance"))
            lines.append(line.format("tolerance"))
    if failures:
        raise ConversionError(
            "the converted weights do not compute what the original does"
            + (f" (with {assumed}, which no file shows: --set changes them)" if assumed else "")
            + "".join(f"\n  {line}" for line in failures)
        )
    rule = f"verify: the tolerance is {TOLERANCE:g} of the largest output, in float32"
    return [*lines, rule + (f"; not in the file, and taken on both sides: {assumed}" if assumed else "")]
