"""A network to look at or to measure: a backbone with its weights, and what its images must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import paddle
from paddle import nn

from passl import checkpoint, convert, log
from passl.checkpoint import CheckpointError
from passl.config import Config, ConfigError, component_parts
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from passl.engine import build, data_section, run, start
from passl.engine.passl_config import translate
from passl.engine.settings import DataSettings
from passl.formats.limits import CheckpointFormatError
from passl.yaml_io import parse


@dataclass
class Subject:
    """A backbone in eval mode.

    Attributes:
        name: of its builder, ``vit_small`` for example.
        channels: as data sets take it: None is 8-bit RGB.
        mean, std: of each channel, for ``Normalize``.
    """

    backbone: nn.Layer
    name: str
    channels: Optional[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Loaded(NamedTuple):
    """A model in eval mode, its configuration with nothing left open, and what its images hold.

    is_whole: whether the weights were those of all of it, not of its backbone alone.
    """

    model: nn.Layer
    is_whole: bool
    config: Config
    data: Optional[DataSettings]


def load_model(config: Config, doing: str) -> Loaded:
    """The model of a checked configuration, with the weights that ``Global.pretrained_model`` names.

    doing: what is done to it, for the warning that it is untrained.

    Raises:
        ConfigError: a value is not what it must be.
        CheckpointError: the weights are not there, or of another network.
    """
    settings = build.global_settings(config)
    log.setup()
    run.set_up(settings)
    config, _ = data_section.complete(config, config, settings, Path(settings.output_dir))
    data = data_section.settings_of(config)
    if data is None and data_section.in_chans(config) != 3:
        raise ConfigError(
            [f"the backbone's in_chans is {data_section.in_chans(config)}: say what images hold, {data_section.ADVICE}"]
        )
    paddle.seed(settings.seed)
    model = build.model(config)
    is_whole = start.load_given(settings, model, doing)
    model.eval()
    return Loaded(model, is_whole, config, data)


def load(config: Config, doing: str) -> Subject:
    """The backbone of :func:`load_model`; its arguments and errors."""
    model, _, config, data = load_model(config, doing)
    backbone = getattr(model, "backbone", model)
    name = component_parts(_backbone_section(config["Model"]))[0]
    if data is None:
        return Subject(backbone, name, None, IMAGENET_MEAN, IMAGENET_STD)
    return Subject(backbone, name, data.channels, tuple(data.mean), tuple(data.std))


def model_of(weights: str, checkpoint_key: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``Model`` of the backbone in a file of weights, by the run's own configuration or else by the names
    and shapes in the file; ``told``: arguments that replace what is found.

    Raises:
        CheckpointError: there is no such file, or no known backbone in it, or one whose arguments it does not show.
    """
    states = checkpoint.with_suffix(weights, checkpoint.STATES)
    if checkpoint.with_suffix(weights, checkpoint.PARAMS).is_file() and states.is_file():
        text = checkpoint.read(states).get("config")
        config = parse(text, f"the configuration in {states}") if text else {}
        if isinstance(config, Mapping) and isinstance(config.get("Model"), Mapping):
            return {**_backbone_section(translate(Config(config, {}), training=False)[0]["Model"]), **told}
    try:
        found = convert.read_backbone(convert.find_file(weights), checkpoint_key)
    except CheckpointFormatError as error:
        raise CheckpointError(str(error)) from error
    if hidden := [name for name in found.unknown if name not in told]:
        raise CheckpointError(
            f"{weights}: a {found.name} whose {', '.join(hidden)} its weights do not show: say it, with "
            f"{' '.join(f'--set {name}=VALUE' for name in hidden)}"
        )
    return {"name": found.name, **found.arguments, **told}


def _backbone_section(model: Mapping[str, Any]) -> Mapping[str, Any]:
    return model.get("backbone") or model
