"""The sections of a configuration that are no components: their fields are the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import passl.data
import passl.evaluators
import passl.models  # noqa: F401  (these imports fill the registries)
from passl.config import Component, Required
from passl.engine.early_stopping import EarlyStopping
from passl.engine.non_finite import NonFinite
from passl.engine.precision import DTYPES, LEVELS, GradScalerSettings
from passl.registry import BACKBONES, DATASETS, EVALUATORS, METHODS, OPTIMIZERS, SCHEDULES, Registry


@dataclass
class GlobalSettings:
    """The section ``Global``.

    Durations (``save_interval``, ``eval_interval``, ``diagnose_every``) are "2ep", "500it", "5%", or a
    bare number of epochs.
    """

    output_dir: str = "./output"
    name: Optional[str] = None  # folder of the run in output_dir; default: Model.name
    device: str = "auto"  # auto: the GPU where there is one; gpu, gpu:0, cpu
    seed: int = 0
    epochs: int = 100
    max_train_step: Optional[int] = None  # stop after so many steps; the schedules still follow `epochs`
    accum_steps: int = 1
    pretrained_model: Optional[str] = None  # prefix, .pdparams, .pth or .safetensors file
    checkpoint_key: Literal["teacher", "student"] = "teacher"  # whose backbone to take from a pre-training run
    checkpoint: Optional[str] = None  # "auto" or a prefix: go on with that run
    save_interval: Union[int, float, str] = 1
    max_num_latest_checkpoint: int = 0  # epoch files kept beside latest and best: 0 none, N the newest N, -1 all
    eval_during_train: bool = True
    eval_interval: Union[int, float, str] = 1
    eval_unit: Literal["epoch", "step"] = "epoch"  # of a bare number in eval_interval
    early_stopping: Optional[EarlyStopping] = None  # by k-NN of teacher and student
    non_finite: NonFinite = NonFinite()  # noqa: RUF009 (frozen); what to do about an infinite loss or gradient
    diagnose_every: Optional[Union[int, float, str]] = "25it"  # the doctor's visits (docs/doctor.md); null: none
    print_batch_step: int = 10
    use_visualdl: bool = True
    flags: dict[str, Any] = field(default_factory=dict)  # paddle.set_flags
    plugins: list[str] = field(default_factory=list)  # files (.py) or modules that register components of the user's


@dataclass
class DataSettings:
    """The section ``Data``: what images hold, for data sets, transforms and backbones that do not say it themselves.

    channels: default: as many as ``mean`` has. mean, std: of each, in the units of training: 8-bit values / 255, 16-bit
    values / 65535, floats as they are.
    """

    channels: Optional[int] = None
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None


@dataclass
class SamplerSettings:
    """``DataLoader.*.sampler``; ``batch_size`` counts images per process and optimizer step; ``pct``, of Train only, is
    the share of the data to train on.
    """

    batch_size: int
    shuffle: bool = True
    drop_last: bool = True
    pct: Optional[float] = None


@dataclass
class LoaderSettings:
    """``DataLoader.*.loader``"""

    num_workers: int = 4
    prefetch_factor: int = 2  # batches that each worker prepares in advance
    use_shared_memory: bool = True
    prefetch_factor: int = 2  # batches that each worker prepares in advance


MODELS = Registry.union("model", METHODS, BACKBONES)


def _data(required: bool) -> Any:
    section = {"dataset": Required(DATASETS), "sampler": Required(SamplerSettings), "loader": LoaderSettings}
    return Required(section) if required else section


def schema(training: bool) -> dict[str, Any]:
    """What a configuration may hold; ``training``: for passl-train (else passl-eval, which accepts the same files)."""
    need = Required if training else (lambda section: section)
    return {
        "Global": GlobalSettings,
        "Data": DataSettings,
        "FP16": {"level": Literal[LEVELS], "dtype": Literal[DTYPES], "GradScaler": GradScalerSettings},
        "DistributedStrategy": {"data_parallel": bool},
        "Model": Required(METHODS if training else MODELS),
        "Schedules": need({"lr": need(Component(SCHEDULES, ("timeline",))), "*": Component(SCHEDULES, ("timeline",))}),
        "Optimizer": need(Component(OPTIMIZERS, ("groups",))),
        "DataLoader": need({"Train": _data(training), "Eval": _data(False)}),
        "Evaluators": [EVALUATORS],
        "Export": {"export_type": Literal["paddle", "onnx"], "input_shape": list},
    }
