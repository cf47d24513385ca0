"""The section ``Data``: which channels the images have, said once for data sets, transforms and backbones.

A run keeps it in its checkpoints, with the rest of its configuration. What starts from such a checkpoint, and has no
section of its own, takes that one.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from passl import checkpoint
from passl.checkpoint import CheckpointError
from passl.config import Config, ConfigError, component_parts
from passl.convert import kept_data
from passl.data import photometric
from passl.data.errors import UnreadableImageError
from passl.data.raw_images import is_eight_bit
from passl.data.samples import ImageSamples
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from passl.engine.settings import MODELS, DataSettings, GlobalSettings
from passl.registry import BATCH_TRANSFORMS, DATASETS, EVALUATORS, SLOTS, TRANSFORMS, Registry

logger = logging.getLogger("passl")

ADVICE = "`passl-data stats FOLDER --out stats.yaml` makes a section Data"


def complete(config: Config, source: Config, settings: GlobalSettings, folder: Path) -> tuple[Config, Config]:
    """``config`` with the section Data, its own or that of the run that it starts from, in every component that asks
    for it; and ``source``, what is saved beside the results, with that section.

    Raises:
        ConfigError: the section contradicts itself or a component.
    """
    own = config.get("Data") or None
    origin, inherited = _of_run(settings, folder)
    if own is None and inherited is not None:
        logger.info("Data: %s, as in the run %s", _shown(inherited), origin)
        config = Config({**config, "Data": inherited}, config.sources)
        source = Config({**source, "Data": inherited}, source.sources)
    elif own is not None and inherited is not None and own != inherited:
        logger.warning(
            "Data: %s, as the configuration says, and not as in the run %s, %s", _shown(own), origin, _shown(inherited)
        )
    data = settings_of(config)
    if data is None:
        _check_default(config)
        return config, source
    return _Filling(data).config(config), source


def check(config: Config) -> None:
    """What can be said of the section before anything is read.

    Raises:
        ConfigError: see ``complete``.
    """
    data = settings_of(config)
    if data is not None:
        _Filling(data).config(config)


def _of_run(settings: GlobalSettings, folder: Path) -> tuple[Optional[Path], Optional[dict[str, Any]]]:
    """The prefix of the checkpoint that a run starts from, and its section Data, if there are any."""
    resumed = folder / "latest" if settings.checkpoint == "auto" else settings.checkpoint
    for given in filter(None, (resumed, settings.pretrained_model)):
        prefix = checkpoint.with_suffix(given, "")
        if not checkpoint.with_suffix(prefix, checkpoint.PARAMS).is_file():
            continue
        try:
            return prefix, kept_data.of_prefix(prefix)
        except (CheckpointError, ConfigError, ValueError) as error:
            # Who needs the checkpoint itself will say what is wrong with it.
            logger.warning("%s: no section Data can be taken from it (%s)", prefix, error)
    return None, None


def _shown(section: Mapping[str, Any]) -> str:
    parts = {
        key: [float(f"{one:.4g}") for one in value] if isinstance(value, list) else value
        for key, value in section.items()
    }
    return "{" + ", ".join(f"{key}: {value}" for key, value in parts.items()) + "}"


def settings_of(config: Mapping[str, Any]) -> Optional[DataSettings]:
    """The section Data with nothing left open; None where there is none.

    Raises:
        ConfigError: see ``complete``.
    """
    section = config.get("Data")
    if not section:
        return None
    data = DataSettings(**section)
    problems = []
    if data.channels is None:
        data.channels = len(data.mean or IMAGENET_MEAN)
    if data.channels < 1:
        raise ConfigError([f"Data.channels ({data.channels}) must be at least 1"])
    if data.mean is None and data.std is None and data.channels == 3:
        data.mean, data.std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values is None:
            problems.append(f"Data.{name} is missing: {ADVICE}")
        elif len(values) != data.channels:
            problems.append(f"Data.{name} has {len(values)} values, and Data.channels is {data.channels}: {ADVICE}")
        elif not all(math.isfinite(value) for value in values) or (name == "std" and min(values) <= 0):
            problems.append(f"Data.{name} ({values}) must be finite numbers{' above 0' if name == 'std' else ''}")
    if problems:
        raise ConfigError(problems)
    return data


class _Filling:
    """Puts the section's values where a component takes them and the configuration does not give them."""

    def __init__(self, data: DataSettings) -> None:
        self.data = data
        self.problems: list[str] = []

    def config(self, config: Config) -> Config:
        sections = dict(config)
        sections["Model"] = self.component(config["Model"], MODELS, "Model")
        if config.get("DataLoader"):
            sections["DataLoader"] = {
                phase: self._loader(part, f"DataLoader.{phase}") for phase, part in config["DataLoader"].items()
            }
        if config.get("Evaluators"):
            sections["Evaluators"] = [
                self.component(spec, EVALUATORS, f"Evaluators.{i}") for i, spec in enumerate(config["Evaluators"])
            ]
        if self.problems:
            raise ConfigError(self.problems)
        return Config(sections, config.sources)

    def _loader(self, section: Any, where: str) -> Any:
        if not section:
            return section
        filled = dict(section)
        for key, registry in (("dataset", DATASETS), ("batch_transform", BATCH_TRANSFORMS)):
            if section.get(key):
                filled[key] = self.component(section[key], registry, f"{where}.{key}")
        return filled

    def component(self, spec: Mapping[str, Any], registry: Registry, where: str) -> dict[str, Any]:
        name, arguments = component_parts(spec)
        parameters = inspect.signature(registry.get(name)).parameters
        filled = {key: self._argument(key, value, f"{where}.{key}") for key, value in arguments.items()}
        for key, value in self._values(registry, parameters).items():
            if key not in filled:
                filled[key] = value
            elif (size := len(filled[key]) if isinstance(value, list) else filled[key]) != self.data.channels:
                has = f"has {size} values" if isinstance(value, list) else f"is {size}"
                self.problems.append(f"{where}.{key} {has}, and Data.channels is {self.data.channels}")
        return {"name": name, **filled}

    def _argument(self, key: str, value: Any, where: str) -> Any:
        if key not in SLOTS or value is None:
            return value
        if isinstance(value, list):
            return [self.component(item, SLOTS[key], f"{where}.{i}") for i, item in enumerate(value)]
        return self.component(value, SLOTS[key], where)

    def _values(self, registry: Registry, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
        """What the section says to a component with these parameters."""
        if registry in (TRANSFORMS, BATCH_TRANSFORMS, EVALUATORS):
            # Elsewhere `mean` may be one number, that of a noise.
            is_per_channel = all(
                name in parameters and isinstance(parameters[name].default, (tuple, list)) for name in ("mean", "std")
            )
            return {"mean": self.data.mean, "std": self.data.std} if is_per_channel else {}
        key = "channels" if registry is DATASETS else "in_chans"
        return {key: self.data.channels} if key in parameters else {}


def in_chans(config: Mapping[str, Any]) -> int:
    """The channels that the configuration says the backbone takes; 3 where it says nothing."""
    arguments = component_parts(config["Model"])[1]
    if arguments.get("backbone"):
        arguments = component_parts(arguments["backbone"])[1]
    return arguments.get("in_chans", 3)


def _check_default(config: Mapping[str, Any]) -> None:
    """Without the section images are RGB: a backbone for other channels would fail at the first batch, with less to
    say.

    Raises:
        ConfigError: the backbone takes other channels, and a data set reads images.
    """
    if in_chans(config) == 3:
        return
    for name, dataset in map(component_parts, _datasets(config)):
        if "channels" in inspect.signature(DATASETS.get(name)).parameters and dataset.get("channels") is None:
            raise ConfigError(
                [f"the backbone's in_chans is {in_chans(config)}, and {name} reads images as 8-bit RGB: {ADVICE}"]
            )


def _datasets(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every data set that the configuration describes."""
    for section in (config.get("DataLoader") or {}).values():
        if section:
            yield section["dataset"]
    for spec in config.get("Evaluators") or []:
        yield from (v for key, v in component_parts(spec)[1].items() if SLOTS.get(key) is DATASETS and v)


def announce(dataset: Any, spec: Mapping[str, Any]) -> None:
    """Say which photometric operations of a training data set's transforms are off; ``spec``: its component."""
    if not isinstance(dataset, ImageSamples) or dataset.channels is None or not _reads_arrays(dataset):
        return
    steps = component_parts(spec)[1].get("transform") or []
    for step in steps if isinstance(steps, list) else [steps]:
        name, arguments = component_parts(step)
        parameters = inspect.signature(TRANSFORMS.get(name)).parameters
        defaults = {key: parameter.default for key, parameter in parameters.items()}
        photometric.say_off(name, dataset.channels, {**defaults, **arguments}, arguments)


def _reads_arrays(dataset: ImageSamples) -> bool:
    if dataset.channels != 3:
        return True
    try:
        return not is_eight_bit(dataset.read(0).data)
    except UnreadableImageError:
        return False
