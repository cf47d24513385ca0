"""From a configuration, or the name of a backbone, to an exported file: what ``passl-export`` does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import paddle
from paddle import nn

from passl import exported
from passl.config import Config, ConfigError, component_parts
from passl.data.datasets import ImageFolder
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from passl.engine import build, subject
from passl.engine.settings import DataSettings
from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import map_dataset
from passl.evaluators.knn import normalize
from passl.export import check_target, export
from passl.exported import ExportError, Meta
from passl.models.classifier import Classifier
from passl.models.exportable import (
    Exportable,
    FeatureNetwork,
    KNNNetwork,
    PredictingNetwork,
    ProbeNetwork,
    check_votes,
    multiple_of,
)
from passl.registry import DATASETS

logger = logging.getLogger("passl")

Sides = tuple[Optional[int], Optional[int]]


@dataclass
class ExportOptions:
    """What the command line says; None is what the configuration says, or else the default.

    Attributes:
        image_size: (height, width); (None, None) is any.
        class_names: file with one name a line.
        knn_bank: class folders whose images classify, in place of a linear head.
    """

    out: Optional[str] = None
    export_type: Optional[str] = None
    image_size: Optional[Sides] = None
    class_names: Optional[str] = None
    knn_bank: Optional[str] = None
    k: int = 20
    temperature: float = 0.07
    batch_size: int = 32
    num_workers: int = 0
    raw: Optional[str] = None


def export_config(config: Config, options: ExportOptions) -> tuple[Path, Meta]:
    """Export the model of a checked configuration; returns the file and its description.

    Raises:
        ConfigError: a value is not what it must be.
        ExportError, CheckpointError: see passl.export and passl.checkpoint.
    """
    settings = build.global_settings(config)
    section = config.get("Export") or {}
    export_type = options.export_type or section.get("export_type") or "paddle"
    out = Path(options.out or f"{config['Model']['name']}{exported.SUFFIXES[export_type]}")
    check_target(out, export_type, options.raw)  # before anything takes time
    model, is_whole, config, data = subject.load_model(config, "exporting")
    sides = options.image_size or _configured_size(section.get("input_shape"), data)
    preprocessing, (height, width) = _preprocessing(config, sides, data)
    _check_sides((height, width), multiple_of(getattr(model, "backbone", model)))
    channels = data.channels if data else None
    bank = None if options.knn_bank is None else _bank(options, preprocessing, channels)
    class_names = _class_names(config, model) if bank is None else bank.class_names
    if options.class_names is not None:
        class_names = _read_names(options.class_names, class_names)
    if bank is None:
        network = _network(model, is_whole, str(settings.pretrained_model))
    else:
        network = _knn_network(getattr(model, "backbone", model), bank, options)
    meta = export(
        network,
        out,
        preprocessing,
        height,
        width,
        export_type,
        class_names,
        architecture=dict(config["Model"]),
        raw=options.raw,
        channels=channels,
    )
    return out, meta


def _network(model: nn.Layer, is_whole: bool, weights: str) -> Exportable:
    if not _predicts(model):
        return FeatureNetwork(getattr(model, "backbone", model))
    if not is_whole:
        raise ExportError(
            f"{weights} has no weights for all of {type(model).__name__}, only a backbone: its classes would be random."
            " Give the latest or best of a run that passl-train made, or use --arch for the backbone alone, or "
            "--knn-bank"
        )
    return ProbeNetwork(model) if isinstance(model, Classifier) else PredictingNetwork(model)


def _predicts(model: nn.Layer) -> bool:
    return hasattr(model, "predict") and hasattr(model, "num_classes")


def _bank(options: ExportOptions, preprocessing: list[dict[str, Any]], channels: Optional[int]) -> ImageFolder:
    """The images in ``options.knn_bank``, once everything else that is said of it is right."""
    try:
        check_batches(options.batch_size, options.num_workers)
        check_votes(options.k, options.temperature)
        return ImageFolder(options.knn_bank, exported.transform(preprocessing), channels=channels)
    except (ValueError, OSError) as error:
        raise ExportError(f"--knn-bank: {error}") from error


def _knn_network(backbone: nn.Layer, bank: ImageFolder, options: ExportOptions) -> KNNNetwork:
    """The backbone with its features of the images in ``bank``."""

    def features(images: paddle.Tensor) -> paddle.Tensor:
        return normalize(backbone(images).astype("float32"))

    try:
        with paddle.no_grad():
            rows, labels, _ = map_dataset(
                features, bank, options.batch_size, "k-NN bank", num_workers=options.num_workers
            )
        network = KNNNetwork(backbone, rows, labels, len(bank.class_names), options.k, options.temperature)
    except ValueError as error:
        raise ExportError(f"--knn-bank: {error}") from error
    logger.info("k-NN bank: %d images of %d classes", len(rows), len(bank.class_names))
    return network


# --- sizes and preprocessing -----------------------------------------------------------------------------------------


def _configured_size(shape: Any, data: Optional[DataSettings] = None) -> Optional[Sides]:
    """(height, width) of ``Export.input_shape``: [N, C, H, W] or [C, H, W]; -1 and None are any size."""
    if shape is None:
        return None
    sides = [None if side in (None, -1, "None") else side for side in shape[-2:]]
    channels = data.channels if data else 3
    if len(shape) not in (3, 4) or shape[-3] != channels or not all(s is None or _is_side(s) for s in sides):
        raise ConfigError([f"Export.input_shape ({shape}) must be [null, {channels}, height, width]; null is any size"])
    return sides[0], sides[1]


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _check_sides(sides: Sides, unit: int) -> None:
    if any(side is not None and side % unit for side in sides) or (sides[0] is None) != (sides[1] is None):
        raise ExportError(
            f"image size {sides[0]} x {sides[1]}: both must be multiples of {unit} (the patch), or both of any size"
        )


def _preprocessing(
    config: Mapping[str, Any], sides: Optional[Sides], data: Optional[DataSettings] = None
) -> tuple[list[dict[str, Any]], Sides]:
    """The validation transform of the configuration, changed where it does not lead to ``sides``, and the sides."""
    found = _validation_transform(config)
    if found is None:
        height, width = sides or (224, 224)
        statistics = (data.mean, data.std) if data else (IMAGENET_MEAN, IMAGENET_STD)
        return exported.standard_preprocessing(height or 224, width or 224, *statistics), (height, width)
    made = exported.output_size(found, data.channels if data else None)
    if sides is None:
        return found, made
    if None not in sides and made != sides:
        logger.info("preprocessing: %d x %d pixels in place of the configuration's %s x %s", *sides, *made)
        return exported.at_size(found, *sides), sides
    return found, sides


def _validation_dataset(config: Mapping[str, Any]) -> Optional[Any]:
    """That of DataLoader.Eval, or else of the first evaluator that has one."""
    dataset = ((config.get("DataLoader") or {}).get("Eval") or {}).get("dataset")
    for spec in config.get("Evaluators") or []:
        name, arguments = component_parts(spec)
        dataset = dataset or arguments.get("dataset" if name == "Classification" else "val_dataset")
    return dataset


def _validation_transform(config: Mapping[str, Any]) -> Optional[list[dict[str, Any]]]:
    """``transform`` of DataLoader.Eval, or of the first evaluator's validation images, in its short form."""
    dataset = _validation_dataset(config)
    steps = component_parts(dataset)[1].get("transform") if dataset else None
    if not isinstance(steps, list):
        return None
    return [{name: dict(arguments)} for name, arguments in map(component_parts, steps)]


# --- class names -----------------------------------------------------------------------------------------------------


def _class_names(config: Mapping[str, Any], model: nn.Layer) -> list[str]:
    """Of what predicts classes: the class folders of DataLoader.Eval or the first evaluator's validation images where
    they are there, else the numbers of the classes.
    """
    if not _predicts(model):
        return []
    numbers = [str(label) for label in range(model.num_classes)]
    dataset = _validation_dataset(config)
    if dataset is None:
        return numbers
    name, arguments = component_parts(dataset)
    try:
        found = DATASETS.get(name)(**{**arguments, "transform": None}).class_names
    except (ValueError, OSError) as error:
        logger.warning("classes get numbers for names, as the validation images cannot be read (%s)", error)
        return numbers
    if found and len(found) != model.num_classes:
        logger.warning(
            "classes get numbers for names: the validation images have %d classes, the %s %d",
            len(found),
            type(model).__name__,
            model.num_classes,
        )
        return numbers
    return found or numbers


def _read_names(path: str, instead_of: list[str]) -> list[str]:
    try:
        names = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--class-names: {path}: {error}") from error
    names = [name.strip() for name in names if name.strip()]
    if not instead_of:
        raise ExportError(
            "--class-names: a backbone alone has no classes; export a LinearProbe or FineTune, or give --knn-bank"
        )
    if len(names) != len(instead_of):
        raise ExportError(f"--class-names: {path} has {len(names)} names, and there are {len(instead_of)} classes")
    return names
