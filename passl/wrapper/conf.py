"""The settings of `DINOWrapper`. Importing this does not import Paddle."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Literal, Optional, Union

from passl.data.multi_crop import MultiCrop
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Size
from passl.registry import did_you_mean
from passl.wrapper import rules
from passl.yaml_io import ConfigError, dump, parse

# What differs between the versions: for them None, in a setting, is these.
VERSIONS: dict[str, dict[str, Any]] = {
    "v1": {
        "global_crops_scale": (0.4, 1.0),
        "local_crops_scale": (0.05, 0.4),
        "momentum_teacher": 0.996,
        "teacher_temp": 0.04,
        "warmup_teacher_temp_epochs": 0,
    },
    "v2": {
        "global_crops_scale": (0.32, 1.0),
        "local_crops_scale": (0.05, 0.32),
        "momentum_teacher": 0.992,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
    },
}
ONLY_V2 = (
    "centering",
    "koleo_loss_weight",
    "ibot_loss_weight",
    "mask_prob",
    "mask_ratio",
)
# Settings that MultiCrop has under the same name, and checks.
VIEW_SETTINGS = (
    "ratio",
    "flip_prob",
    "jitter_prob",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "gray_prob",
    "blur_radius",
    "global_blur_probs",
    "global_solarize_probs",
    "local_blur_prob",
    "mean",
    "std",
)
HEAD_SETTINGS = ("out_dim", "hidden_dim", "bottleneck_dim", "num_layers", "use_bn", "norm_last_layer")


@dataclasses.dataclass
class Settings:
    """The names, defaults and types of all settings; docs/wrapper.md says what each does."""

    version: Literal["v1", "v2"] = "v1"
    # views
    global_crops_number: int = 2
    global_crop_size: Size = 224
    local_crops_number: int = 8
    local_crop_size: Size = 96
    global_crops_scale: Optional[Sequence[float]] = None
    local_crops_scale: Optional[Sequence[float]] = None
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: float = 0.2
    blur_radius: Optional[Sequence[float]] = None
    global_blur_probs: Sequence[float] = (1.0, 0.1)
    global_solarize_probs: Sequence[float] = (0.0, 0.2)
    local_blur_prob: float = 0.5
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    seed: int = 0
    # features
    return_layer: Union[str, Sequence[str], None] = None
    preprocess_func: Optional[Callable[[Any], Any]] = None
    # head
    out_dim: int = 512
    hidden_dim: int = 256
    bottleneck_dim: int = 64
    num_layers: int = 3
    use_bn: bool = True
    norm_last_layer: bool = True
    freeze_last_layer: Optional[int] = None
    # losses
    student_temp: float = 0.1
    warmup_teacher_temp: float = 0.04
    teacher_temp: Optional[float] = None
    warmup_teacher_temp_epochs: Optional[int] = None
    center_momentum: float = 0.9
    centering: Literal["softmax", "sinkhorn"] = "sinkhorn"
    koleo_loss_weight: float = 0.1
    ibot_loss_weight: float = 1.0
    mask_prob: float = 0.5
    mask_ratio: Sequence[float] = (0.1, 0.5)
    # teacher and time
    momentum_teacher: Optional[float] = None
    epochs: int = 100
    len_train_loader: Optional[int] = None


NAMES = tuple(field.name for field in dataclasses.fields(Settings))


class _Load:
    """`DINOConf.load(path)` makes new settings, `conf.load(path)` changes those of ``conf``."""

    def __get__(self, conf: Optional[DINOConf], owner: type[DINOConf]) -> Callable[..., DINOConf]:
        def load(path: Union[str, os.PathLike]) -> DINOConf:
            """Reads settings from a YAML file with one name for each line; raises ConfigError with the file's name."""
            return (owner() if conf is None else conf)._take(_read(os.fspath(path)), f"{os.fspath(path)}: ")

        return load


class DINOConf:
    """The settings of :class:`DINOWrapper`, all with defaults: `DINOConf(version="v2", local_crop_size=(240, 320))`.

    What is not given follows from the version, also if that changes later. Settings are attributes, and assigning one
    checks it: `conf.epochs = 20`. `print(conf)` shows all.

    Raises:
        ConfigError: an unknown name, or a value that breaks a rule; all that is wrong at once.
    """

    load = _Load()
    _given: dict[str, Any]

    def __init__(self, version: str = "v1", **settings: Any) -> None:
        object.__setattr__(self, "_given", {})
        self._take({"version": version, **settings}, "DINOConf: ")

    def merge(self, settings: Mapping[str, Any]) -> DINOConf:
        """Changes the settings of these names, all or none of them. Returns itself."""
        if not isinstance(settings, Mapping):
            raise ConfigError([f"DINOConf.merge takes a dict of settings, not {settings!r}"])
        return self._take(settings, "DINOConf.merge: ")

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return {name: getattr(self, name) for name in NAMES}

    def copy(self) -> DINOConf:
        """Equal settings, which later changes of these leave alone."""
        return type(self)(**self._given)

    def view_arguments(self) -> dict[str, Any]:
        """The arguments of MultiCrop, and of BatchMultiCrop."""
        return {
            "global_crops_size": self.global_crop_size,
            "local_crops_size": self.local_crop_size,
            "global_crops_scale": self.global_crops_scale,
            "local_crops_scale": self.local_crops_scale,
            "num_local_crops": self.local_crops_number,
            **{name: getattr(self, name) for name in VIEW_SETTINGS},
        }

    def head_arguments(self) -> dict[str, Any]:
        """The arguments of DINOHead."""
        return {name: getattr(self, name) for name in HEAD_SETTINGS}

    def _take(self, settings: Mapping[str, Any], source: str) -> DINOConf:
        unknown = [name for name in settings if name not in NAMES]
        problems = [f"{source}there is no setting {name!r}. {did_you_mean(str(name), NAMES)}" for name in unknown]
        if problems:
            raise ConfigError(problems)
        given = {**self._given, **{name: rules.plain(value) for name, value in settings.items()}}
        values = _resolved(given)
        problems = [f"{source}{problem}" for problem in _problems(values, given)]
        if problems:
            raise ConfigError(problems)
        self.__dict__.update(values, _given=given)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        self._take({name: value}, "DINOConf: ")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DINOConf) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        return f"DINOConf({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    def __str__(self) -> str:
        return "\n".join(["DINOConf", *(f"  {name}: {_shown(value)}" for name, value in self.to_dict().items())])


DINOConf.__signature__ = inspect.signature(Settings)  # for help(), editors and whoever asks for the names


def _read(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            settings = parse(file.read(), path)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from error
    if not isinstance(settings, dict):
        raise ConfigError([f"{path}: expected settings such as 'version: v2', one on each line, not {settings!r}"])
    return settings


def _resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings: what is given, and else what the version says."""
    values = {**dataclasses.asdict(Settings()), **given}
    of_version = VERSIONS.get(values["version"] if isinstance(values["version"], str) else "", {})
    for name, value in of_version.items():
        if values[name] is None:
            values[name] = value
            if name == "warmup_teacher_temp_epochs" and rules.is_count(values["epochs"]):
                values[name] = min(value, values["epochs"])
    if values["blur_radius"] is None:
        values["blur_radius"] = rules.blur_radius(values["global_crop_size"])
    return values


def _problems(values: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    if values["version"] not in VERSIONS:
        return [f"version ({values['version']!r}) must be 'v1' (DINO) or 'v2' (DINOv2)"]
    problems = rules.problems(values)
    if values["version"] == "v1":
        found = [name for name in ONLY_V2 if given.get(name) is not None]
        problems += [f"{name} is a setting of DINOv2: set version='v2', or leave it out" for name in found]
    if not problems:
        conf = {name: values[name] for name in VIEW_SETTINGS}
        try:
            MultiCrop(num_local_crops=values["local_crops_number"], **conf)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    return problems


def _shown(value: Any) -> str:
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return dump(list(value) if isinstance(value, tuple) else value).strip().removesuffix("\n...")
