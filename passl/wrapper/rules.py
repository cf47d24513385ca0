"""What the values of `DINOConf` have to be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

POSITIVE = (
    "epochs",
    "out_dim",
    "hidden_dim",
    "bottleneck_dim",
    "num_layers",
)
NOT_NEGATIVE = ("local_crops_number", "warmup_teacher_temp_epochs", "seed")
TEMPERATURES = ("student_temp", "warmup_teacher_temp", "teacher_temp")
SHARES = ("momentum_teacher", "center_momentum", "mask_prob")
WEIGHTS = ("koleo_loss_weight", "ibot_loss_weight")
SWITCHES = ("use_bn", "norm_last_layer")


def plain(value: Any) -> Any:
    """Lists, which YAML gives, as tuples."""
    return tuple(plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def blur_radius(crop_size: Any) -> tuple[float, float]:
    """The official 0.1 to 2 pixels of crops of 224, and less of smaller ones, of which as much would leave little."""
    sides = crop_size if isinstance(crop_size, tuple) else (crop_size,)
    share = min(sides) / 224 if sides and all(map(is_count, sides)) else 1.0
    return (0.1 * min(share, 1.0), 2.0 * min(share, 1.0))


def problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings, all of which are there: value, rule, what to write."""
    return [*_of_counts(values), *_of_numbers(values), *_of_views(values), *_of_features(values)]


def _of_counts(values: Mapping[str, Any]) -> Iterator[str]:
    for least, names in ((1, POSITIVE), (0, NOT_NEGATIVE)):
        for name in names:
            if not is_count(values[name]) or values[name] < least:
                yield f"{name} ({values[name]!r}) must be a whole number of at least {least}"
    length = values["len_train_loader"]
    if length is not None and (not is_count(length) or length < 1):
        yield (
            f"len_train_loader ({length!r}) must be the number of batches in an epoch, len(train_loader), or None if "
            "it is not known"
        )
    frozen = values["freeze_last_layer"]
    if frozen is not None and (not is_count(frozen) or frozen < 0):
        yield f"freeze_last_layer ({frozen!r}) must be a whole number of epochs, at least 0, or None for all"
    warmup, epochs = values["warmup_teacher_temp_epochs"], values["epochs"]
    if is_count(warmup) and is_count(epochs) and warmup > epochs:
        yield f"warmup_teacher_temp_epochs ({warmup}) must be at most epochs ({epochs})"


def _of_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    for name in TEMPERATURES:
        if not is_number(values[name]) or values[name] <= 0:
            yield f"{name} ({values[name]!r}) must be a number above 0"
    for name in SHARES:
        if not is_number(values[name]) or not 0 <= values[name] <= 1:
            yield f"{name} ({values[name]!r}) must be a number from 0 to 1"
    for name in WEIGHTS:
        if not is_number(values[name]) or values[name] < 0:
            yield f"{name} ({values[name]!r}) must be a number of at least 0, which leaves that loss out"
    for name in SWITCHES:
        if not isinstance(values[name], bool):
            yield f"{name} ({values[name]!r}) must be True or False"
    if values["centering"] not in ("softmax", "sinkhorn"):
        yield f"centering ({values['centering']!r}) must be 'softmax' or 'sinkhorn'"
    if not _is_range(values["mask_ratio"]):
        yield f"mask_ratio ({values['mask_ratio']!r}) must be (low, high), shares of the patches from 0 to 1"


def _of_views(values: Mapping[str, Any]) -> Iterator[str]:
    number = values["global_crops_number"]
    if number != 2 or not is_count(number):
        yield (
            f"global_crops_number ({number!r}) must be 2: the loss compares each view with what the teacher makes of "
            "two global crops. For more views of an image raise local_crops_number, with a local_crop_size and "
            "local_crops_scale as large as you like"
        )
    for name in ("global_crop_size", "local_crop_size"):
        size = values[name]
        sides = size if isinstance(size, tuple) else (size, size)
        if len(sides) != 2 or not all(is_count(side) and side > 0 for side in sides):
            yield f"{name} ({size!r}) must be a number of pixels, or (height, width)"
    for name in ("global_crops_scale", "local_crops_scale"):
        if not _is_range(values[name]) or not values[name][0] > 0:
            yield f"{name} ({values[name]!r}) must be (low, high), shares of the image's area above 0 and at most 1"
    for name in ("mean", "std"):
        if not isinstance(values[name], tuple) or not values[name] or not all(map(is_number, values[name])):
            yield f"{name} ({values[name]!r}) must be a list of one number for each channel, such as [0.5]"


def _of_features(values: Mapping[str, Any]) -> Iterator[str]:
    names = values["return_layer"]
    if names is not None:
        several = names if isinstance(names, tuple) else (names,)
        if not several or not all(isinstance(name, str) and name for name in several):
            yield (
                f"return_layer ({names!r}) must be the dotted name of a sublayer, such as 'layer4.1', or a list of them"
            )
        elif len(set(several)) < len(several):
            yield f"return_layer ({list(several)}) must name each sublayer once"
    function = values["preprocess_func"]
    if function is not None and not callable(function):
        yield (
            f"preprocess_func ({function!r}) must be a function of the features, such as lambda x: x.mean([2, 3]); a "
            "YAML file cannot hold one: set it in Python"
        )


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value)) and 0 <= value[0] <= value[1] <= 1
    )
