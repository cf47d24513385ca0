"""Where a checked configuration meets the classes it names; nothing else knows both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from paddle import nn

from passl import distributed
from passl.config import Config, ConfigError, component_parts
from passl.data.loader import EpochSampler, Loader
from passl.data.samples import Samples
from passl.data.transforms import Compose
from passl.engine import data_section
from passl.engine.early_stopping import EarlyStopping
from passl.engine.guard import Guard
from passl.engine.non_finite import NonFinite
from passl.engine.optim import Optimizer, ParamGroup
from passl.engine.precision import GradScalerSettings, Precision
from passl.engine.recompute import recompute_blocks
from passl.engine.settings import (
    MODELS,
    DistributedSettings,
    GlobalSettings,
    LoaderSettings,
    RecomputeSettings,
    ReportSettings,
    SamplerSettings,
    ShardingSettings,
)
from passl.engine.sharding import ShardedOptimizer
from passl.evaluators import Classification, Evaluator
from passl.evaluators.evaluator import backbones_of
from passl.models.method import Method
from passl.registry import BATCH_TRANSFORMS, DATASETS, EVALUATORS, OPTIMIZERS, SCHEDULES, SLOTS, Registry
from passl.schedules import Schedule, Timeline

logger = logging.getLogger("passl")

_FACTORIES = ("backbone", "head", "ibot_head")  # a method decides how often and with what widths it builds these


def component(spec: Mapping[str, Any], registry: Registry, where: str, **provided: Any) -> Any:
    """Build ``{name: X, ...arguments}`` with everything nested in it.

    Args:
        where: dotted key of ``spec``, for messages.
        provided: arguments that the engine adds.

    Raises:
        ConfigError: the constructor refused a value.
    """
    name, arguments = component_parts(spec)
    arguments = {key: _argument(key, value, f"{where}.{key}") for key, value in arguments.items()}
    try:
        return registry.get(name)(**arguments, **provided)
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{where} ({name}): {error}"]) from error


def _argument(key: str, value: Any, where: str) -> Any:
    if key not in SLOTS or value is None:
        return value
    if isinstance(value, list):
        return Compose([component(item, SLOTS[key], f"{where}.{i}") for i, item in enumerate(value)])
    if key in _FACTORIES:
        name, arguments = component_parts(value)
        return functools.partial(SLOTS[key].get(name), **arguments)
    return component(value, SLOTS[key], where)


def global_settings(config: Config) -> GlobalSettings:
    section = dict(config.get("Global") or {})
    kinds = {"early_stopping": EarlyStopping, "guard": Guard, "non_finite": NonFinite, "report": ReportSettings}
    for key, kind in kinds.items():
        if isinstance(section.get(key), Mapping):
            try:
                section[key] = kind(**section[key])
            except ValueError as error:
                raise ConfigError([f"Global.{key}: {error}"]) from error
    settings = GlobalSettings(**section)
    if settings.report is True:
        settings.report = ReportSettings()
    return settings


def path_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with ``Global.name``, which becomes a folder in ``Global.output_dir``."""
    section = config.get("Global")
    name = section.get("name") if isinstance(section, Mapping) else None
    if not isinstance(name, str) or (name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")):
        return []
    return [f"Global.name ({name!r}) must be the name of one folder, without '/': say where in Global.output_dir"]


def model(config: Config) -> nn.Layer:
    """The Method or backbone of section ``Model``."""
    return component(config["Model"], MODELS, "Model")


def precision(config: Config, fallen_back_to: Optional[Mapping[str, str]] = None) -> Precision:
    """``fallen_back_to``: level and dtype instead of the configuration's, see `NonFinite`."""
    section = {**(config.get("FP16") or {}), **(fallen_back_to or {})}
    scaler = section.pop("GradScaler", None)
    try:
        return Precision(**section, grad_scaler=GradScalerSettings(**scaler) if scaler else None)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def strategy(config: Config) -> DistributedSettings:
    section = dict(config.get("DistributedStrategy") or {})
    try:
        for key, settings in (("sharding", ShardingSettings), ("recompute", RecomputeSettings)):
            if isinstance(section.get(key), Mapping):
                section[key] = settings(**section[key])
        return DistributedSettings(**{key: value for key, value in section.items() if value is not None})
    except ValueError as error:
        raise ConfigError([f"DistributedStrategy.{error}"]) from error


def recompute(config: Config, method: Method) -> None:
    """What ``DistributedStrategy.recompute`` says."""
    amount = strategy(config).recompute
    if not amount:
        return
    interval = 1
    if isinstance(amount, RecomputeSettings):
        amount, interval = True, amount.layerlist_interval
    try:
        count = recompute_blocks(method, amount, interval)
    except ValueError as error:
        raise ConfigError([f"DistributedStrategy.recompute: {error}"]) from error
    logger.info("recompute: %d blocks of the backbone are computed again in the backward pass", count)


def train_loader(config: Config, seed: int) -> Loader:
    """The loader of ``DataLoader.Train``, sharing each global batch out over the processes."""
    section = config["DataLoader"]["Train"]
    dataset = component(section["dataset"], DATASETS, "DataLoader.Train.dataset")
    data_section.announce(dataset, section["dataset"])
    sampling = SamplerSettings(**section["sampler"])
    loading = LoaderSettings(**(section.get("loader") or {}))
    try:
        sampler = EpochSampler(
            len(dataset),
            sampling.batch_size,
            seed=seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            shuffle=sampling.shuffle,
            drop_last=sampling.drop_last,
            pct=sampling.pct,
        )
    except ValueError as error:
        raise ConfigError([f"DataLoader.Train.sampler: {error}"]) from error
    dataset.pool = sampler.subset
    spec, batch_transform = section.get("batch_transform"), None
    if spec:
        batch_transform = component(spec, BATCH_TRANSFORMS, "DataLoader.Train.batch_transform")
    try:
        return Loader(
            dataset,
            sampler,
            loading.num_workers,
            seed,
            loading.prefetch_factor,
            loading.use_shared_memory,
            batch_transform,
        )
    except ValueError as error:
        raise ConfigError([f"DataLoader.Train.loader: {error}"]) from error


def timeline(loader: Loader, epochs: int) -> Timeline:
    """The run's length: ``epochs`` over the loader's data."""
    steps = loader.sampler.steps_per_epoch
    batch = loader.sampler.batch_size * distributed.world_size()
    return Timeline(total_steps=epochs * steps, steps_per_epoch=steps, global_batch_size=batch)


def schedules(config: Config, line: Timeline) -> dict[str, Schedule]:
    return {
        name: component(spec, SCHEDULES, f"Schedules.{name}", timeline=line)
        for name, spec in config["Schedules"].items()
        if spec is not None
    }


def optimizer(config: Config, method: Method) -> Optimizer:
    """The optimizer over the method's groups; names every parameter after its place, which keys the optimizer's
    state.
    """
    for name, parameter in method.named_parameters():
        parameter.name = name
    build = functools.partial(_optimizer, config)
    groups = method.param_groups()
    return ShardedOptimizer(build, groups) if _shares_state(strategy(config)) else build(groups)


def _optimizer(config: Config, groups: Sequence[ParamGroup]) -> Optimizer:
    return component(config["Optimizer"], OPTIMIZERS, "Optimizer", groups=groups)


def _shares_state(settings: DistributedSettings) -> bool:
    processes = distributed.world_size()
    sharding = ShardingSettings() if settings.sharding is True else settings.sharding
    if not sharding or sharding.sharding_degree == 1:
        return False
    if processes == 1:
        logger.info("DistributedStrategy.sharding: one process has nothing to share")
        return False
    if sharding.sharding_degree not in (None, -1, processes):
        raise ConfigError(
            [
                f"DistributedStrategy.sharding.sharding_degree ({sharding.sharding_degree}) must be the number of "
                f"processes ({processes}), or -1: shares of groups of them are not supported"
            ]
        )
    return True


def evaluators(config: Config, subject: nn.Layer) -> list[Evaluator]:
    """Section ``Evaluators``, after the accuracy on ``DataLoader.Eval`` where that is given.

    Raises:
        ConfigError: one of them cannot measure ``subject``, or its data cannot be used.
    """
    found: dict[str, Evaluator] = {}
    section: Optional[Mapping] = (config.get("DataLoader") or {}).get("Eval")
    if section is not None:
        if section["sampler"].get("pct") is not None:
            raise ConfigError(["DataLoader.Eval.sampler.pct: only DataLoader.Train takes a share of the data"])
        dataset = component(section["dataset"], DATASETS, "DataLoader.Eval.dataset")
        loading = LoaderSettings(**(section.get("loader") or {}))
        try:
            found["DataLoader.Eval"] = Classification(
                dataset,
                section["sampler"]["batch_size"],
                loading.num_workers,
                prefetch_factor=loading.prefetch_factor,
                use_shared_memory=loading.use_shared_memory,
            )
        except ValueError as error:
            raise ConfigError([f"DataLoader.Eval: {error}"]) from error
    for number, spec in enumerate(config.get("Evaluators") or []):
        found[f"Evaluators.{number}"] = component(spec, EVALUATORS, f"Evaluators.{number}")
    problems = [
        f"{where}: {problem}" for where, evaluator in found.items() for problem in _unmeasurable(evaluator, subject)
    ]
    problems += _collisions(found)
    if problems:
        raise ConfigError(problems)
    return list(found.values())


def _collisions(found: Mapping[str, Evaluator]) -> list[str]:
    """Results of two evaluators with one name, of which one would be lost."""
    owner: dict[str, str] = {}
    problems = []
    for where, evaluator in found.items():
        taken = [name for name in evaluator.result_names() if name in owner]
        if taken:
            remedy = "measure them with configurations of their own"
            for argument in ("prefix", "file"):
                if hasattr(evaluator, argument):
                    remedy = f"give one another {argument}, -o {where}.{argument}=NAME"
            problems.append(
                f"{where}: {type(evaluator).__name__} gives {taken[0]!r}, as {owner[taken[0]]} does, and one of the "
                f"two would be lost: {remedy}"
            )
        owner.update(dict.fromkeys(evaluator.result_names(), where))
    return problems


def _unmeasurable(evaluator: Evaluator, subject: nn.Layer) -> list[str]:
    name, kind = type(evaluator).__name__, type(subject).__name__
    if evaluator.subject == "method" and not hasattr(subject, "predict"):
        return [f"{name} measures predicted classes, and {kind} has none"]
    missing = [model for model in evaluator.models if model not in backbones_of(subject)]
    if evaluator.subject != "backbones" or not missing:
        return []
    hint = "remove it from models"
    if not isinstance(subject, Method):
        hint += "; -o Global.checkpoint_key=student loads the student's weights of a run into it"
    return [f"{name} measures the {' and the '.join(missing)}, and {kind} has none: {hint}"]


def check_labels(model: nn.Layer, train: Optional[Samples], evaluators: Sequence[Evaluator]) -> None:
    """A model that predicts classes needs labels below ``num_classes``, the same in training and evaluation.

    Raises:
        ConfigError: with all problems.
    """
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        return
    datasets = {} if train is None else {"DataLoader.Train": train}
    datasets.update({type(e).__name__: e.dataset for e in evaluators if isinstance(e, Classification)})
    problems = []
    for where, dataset in datasets.items():
        if dataset.labels is None:
            problems.append(f"{where}: {type(model).__name__} needs labels: class folders (ImageFolder), or a csv list")
        elif dataset.labels.max() >= num_classes:
            problems.append(f"{where}: a label is {dataset.labels.max()}, and Model.num_classes is {num_classes}")
        elif train is not None and dataset.class_names and train.class_names not in ([], dataset.class_names):
            odd = sorted(set(dataset.class_names) ^ set(train.class_names)) or dataset.class_names
            problems.append(
                f"{where}: its classes are not those of DataLoader.Train, so labels would not agree; only in one of "
                f"them, or in another order: {', '.join(odd[:10])}"
            )
    if problems:
        raise ConfigError(problems)
