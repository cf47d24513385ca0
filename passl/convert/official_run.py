"""The rest of an official full checkpoint, with which a run goes on: optimizer, epoch, scaler, and its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import numpy as np

from passl.convert.conversion import Conversion
from passl.convert.kept_data import of_source
from passl.convert.layout import Slot
from passl.convert.optimizer_state import from_official
from passl.convert.report import ConversionError
from passl.convert.source import Source
from passl.formats.limits import DAMAGE

_DEFAULT_ARGS = {
    "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True, "momentum_teacher": 0.996,
    "use_bn_in_head": False, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0,
    "use_fp16": True, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64,
    "epochs": 100, "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw",
    "drop_path_rate": 0.1, "global_crops_scale": (0.4, 1.0), "local_crops_number": 8, "local_crops_scale": (0.05, 0.4),
    "data_path": "./dataset/ILSVRC2012/train", "seed": 0,
    "num_workers": 10, "world_size": 1,
}  # fmt: skip
_OPTIMIZERS = {"adamw": "AdamW", "sgd": "Momentum", "lars": "LARS"}


class ResumeState(NamedTuple):
    """What stands beside the weights: the content of ``.pdopt`` and ``.pdstates``, and a configuration (None where the
    file has no arguments, or the architecture is not all visible).
    """

    optimizer: dict[str, Any]
    states: dict[str, Any]
    recipe: Optional[dict[str, Any]]


def resume_state(source: Source, conversion: Conversion) -> ResumeState:
    """With what ``Global.checkpoint`` continues the official run in ``source``.

    Raises:
        ConversionError: the file has no optimizer or epoch, or an optimizer whose state does not map.
    """
    optimizer, epoch = source.aside.get("optimizer"), source.aside.get("epoch")
    if not isinstance(optimizer, Mapping) or type(epoch) is not int:
        raise ConversionError("the file has no optimizer or epoch")
    args, scaler = source.aside.get("args"), source.aside.get("fp16_scaler")
    try:
        found = from_official(optimizer, student_parameters(conversion))
        # A guessed number of heads would train another network, without a word.
        is_known = isinstance(args, argparse.Namespace) and not (
            conversion.architecture and conversion.architecture.unknown
        )
        recipe = recipe_of(vars(args), conversion) if is_known else None
        if recipe is not None and (data := of_source(source)):
            recipe["Data"] = data
        states = {
            "step": found.steps or 0,
            "epoch": epoch + source.is_clemsgrs,  # theirs is the last epoch, the official one the next
            "converted": True,  # the rest of what identifies a run is not in an official file
            "scaler": _scaler(scaler) if isinstance(scaler, Mapping) and scaler else {},
            "progress": {},
            "origin": {
                "counters": conversion.counters,
                "param_groups": [_plain(group) for group in optimizer["param_groups"]],
                "steps_behind": found.behind,
                "counts_in_int": any(type(value.get("step")) is int for value in optimizer["state"].values()),
                "args": _plain(vars(args)) if isinstance(args, argparse.Namespace) else None,
                "fp16_scaler": _plain(scaler) if isinstance(scaler, Mapping) else None,
            },
        }
    except ConversionError:
        raise
    except DAMAGE as error:  # anything can stand where numbers are expected
        raise ConversionError(
            f"the optimizer, scaler or arguments are not those of the official trainer: {error!r}"
        ) from error
    return ResumeState(found.entries, states, recipe)


def student_parameters(conversion: Conversion) -> list[Slot]:
    """The student's parameters (not its running statistics), in PyTorch's order."""
    return [
        slot
        for slot in conversion.layout
        if slot.name.startswith("student.") and not slot.torch_name.endswith(("running_mean", "running_var"))
    ]


def recipe_of(official_args: Mapping[str, Any], conversion: Conversion) -> dict[str, Any]:
    """A configuration that trains as the official trainer does with these arguments."""
    args = {**_DEFAULT_ARGS, **official_args}
    model = {key: dict(value) if isinstance(value, Mapping) else value for key, value in conversion.model.items()}
    if args["drop_path_rate"] and _takes_drop_path(model["backbone"]["name"]):
        model["backbone"]["drop_path_rate"] = args["drop_path_rate"]
    model["head"]["norm_last_layer"] = bool(args["norm_last_layer"])
    temperature = float(args["teacher_temp"])
    if args["optimizer"] not in _OPTIMIZERS:
        raise ConversionError(f"its optimizer ({args['optimizer']}) is none of {', '.join(_OPTIMIZERS)}")
    optimizer: dict[str, Any] = {"name": _OPTIMIZERS[args["optimizer"]]}
    if args["clip_grad"]:
        optimizer.update(clip_norm=float(args["clip_grad"]), clip_mode="each")
    return {
        "Global": {
            "device": "auto",
            "seed": int(args["seed"]),
            "epochs": int(args["epochs"]),
            "output_dir": "./output",  # that of the arguments is a folder on another machine
        },
        "FP16": {"level": "O1" if args["use_fp16"] else "O0"},
        "Model": {**model, "freeze_last_layer": int(args["freeze_last_layer"])},
        "Schedules": {
            "lr": {
                "name": "Cosine",
                "base": float(args["lr"]),
                "final": float(args["min_lr"]),
                "warmup": f"{args['warmup_epochs']}ep",
                "reference_batch_size": 256,
            },
            "weight_decay": _cosine(args["weight_decay"], args["weight_decay_end"]),
            "teacher_momentum": _cosine(args["momentum_teacher"], 1.0),
            "teacher_temp": {
                **_cosine(temperature, temperature),
                "warmup": f"{args['warmup_teacher_temp_epochs']}ep",
                "warmup_start": float(args["warmup_teacher_temp"]),
                "per_epoch": True,
            },
        },
        "Optimizer": optimizer,
        "DataLoader": {
            "Train": {
                "dataset": {
                    "name": "ImageFolder",
                    "root": str(args["data_path"]),
                    "transform": {
                        "name": "MultiCrop",
                        "global_crops_scale": _floats(args["global_crops_scale"]),
                        "local_crops_scale": _floats(args["local_crops_scale"]),
                        "num_local_crops": int(args["local_crops_number"]),
                    },
                },
                "sampler": {"batch_size": int(args["batch_size_per_gpu"])},
                "loader": {"num_workers": int(args["num_workers"])},
            }
        },
    }


def _takes_drop_path(backbone: str) -> bool:
    return not backbone.lower().startswith("resnet")


def _cosine(base: Any, final: Any) -> dict[str, Any]:
    return {"name": "Cosine", "base": float(base), "final": float(final)}


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


def _scaler(official: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's gradient scaler as Paddle's; PyTorch's lowers the scale at the first gradient that is not finite."""
    return {
        "scale": np.array([official["scale"]], np.float32),
        "incr_ratio": float(official["growth_factor"]),
        "decr_ratio": float(official["backoff_factor"]),
        "incr_every_n_steps": int(official["growth_interval"]),
        "decr_every_n_nan_or_inf": 1,
        "incr_count": int(official["_growth_tracker"]),
        "decr_count": 0,
        "use_dynamic_loss_scaling": True,
    }


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's, in containers too; what is neither number nor text as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, (np.generic, np.ndarray)) and np.size(value) == 1:
        return value.item()
    return value if isinstance(value, (int, float, str, np.ndarray, type(None))) else str(value)
