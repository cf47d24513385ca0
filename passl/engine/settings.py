"""The sections of a configuration that are no components: their fields are the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import passl.data
import passl.evaluators
import passl.models  # noqa: F401  (these imports fill the registries)
from passl.config import Component, Required
from passl.engine.early_stopping import EarlyStopping
from passl.engine.guard import Guard
from passl.engine.non_finite import NonFinite
from passl.engine.precision import DTYPES, LEVELS, GradScalerSettings
from passl.exported import require
from passl.registry import BACKBONES, BATCH_TRANSFORMS, DATASETS, EVALUATORS, METHODS, OPTIMIZERS, SCHEDULES, Registry

_MODULES = {"tsne": "sklearn", "umap": "umap"}


@dataclass(frozen=True)
class ReportSettings:
    """``Global.report``: the images whose attention is shown, and those that are points of the map of features, laid
    out by t-SNE where scikit-learn is installed ("auto"), else by the two main directions.
    """

    images: int = 4
    points: int = 1000
    method: Literal["auto", "tsne", "umap", "pca"] = "auto"

    def __post_init__(self) -> None:
        for name in ("images", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        # Here, for the first to need it comes after the training.
        if self.method in _MODULES:
            require(_MODULES[self.method], "viz")


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
    guard: Optional[Guard] = None  # over the features that a run starts with, by k-NN or by their drift
    non_finite: NonFinite = NonFinite()  # noqa: RUF009 (frozen); what to do about an infinite loss or gradient
    report: Union[bool, ReportSettings] = False  # write report.html at the end
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


@dataclass
class ShardingSettings:
    """``DistributedStrategy.sharding``, in the words of Paddle's own trainers."""

    sharding_stage: int = 1
    sharding_degree: Optional[int] = None  # null or -1: over all processes; 1: not at all
    sharding_offload: bool = False

    def __post_init__(self) -> None:
        if self.sharding_stage != 1:
            raise ValueError(
                f"sharding.sharding_stage ({self.sharding_stage}) must be 1: the optimizer's state is shared, "
                "gradients and weights stay whole on every process"
            )
        if self.sharding_degree is not None and self.sharding_degree < 1 and self.sharding_degree != -1:
            raise ValueError(
                f"sharding.sharding_degree ({self.sharding_degree}) must be the number of processes, or -1"
            )
        if self.sharding_offload:
            raise ValueError("sharding.sharding_offload (true): the state stays where the weights are: remove it")


@dataclass
class RecomputeSettings:
    """``DistributedStrategy.recompute`` in PASSL's words."""

    layerlist_interval: int = 1  # every so manieth block
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.layerlist_interval < 1:
            raise ValueError(f"recompute.layerlist_interval ({self.layerlist_interval}) must be at least 1")
        if self.names:
            raise ValueError(f"recompute.names ({self.names}): whole blocks are recomputed, no other layers: remove it")


@dataclass
class DistributedSettings:
    """The section ``DistributedStrategy``.

    sharding: true: each process keeps its share of the optimizer's state. recompute: true: the backward computes the
    inside of the backbone's blocks again; a number: so many of them; with a point, such as 0.5: that share of them.
    """

    data_parallel: bool = True
    sharding: Union[bool, ShardingSettings] = False
    recompute: Union[bool, int, float, RecomputeSettings] = False

    def __post_init__(self) -> None:
        if not self.data_parallel:
            raise ValueError(
                "data_parallel (false) must be true: several processes have no other way to share the work"
            )
        if isinstance(self.recompute, RecomputeSettings):
            return
        if self.recompute < 0 or (isinstance(self.recompute, float) and self.recompute > 1):
            raise ValueError(
                f"recompute ({self.recompute}) must be true, a number of blocks, or a share from 0.0 to 1.0"
            )


MODELS = Registry.union("model", METHODS, BACKBONES)


def _data() -> dict[str, Any]:
    return {"dataset": Required(DATASETS), "sampler": Required(SamplerSettings), "loader": LoaderSettings}


def _train_data(required: bool) -> Any:
    section = {**_data(), "batch_transform": BATCH_TRANSFORMS}
    return Required(section) if required else section


def schema(training: bool) -> dict[str, Any]:
    """What a configuration may hold; ``training``: for passl-train (else passl-eval, which accepts the same files)."""
    need = Required if training else (lambda section: section)
    return {
        "Global": GlobalSettings,
        "Data": DataSettings,
        "FP16": {"level": Literal[LEVELS], "dtype": Literal[DTYPES], "GradScaler": GradScalerSettings},
        "DistributedStrategy": DistributedSettings,
        "Model": Required(METHODS if training else MODELS),
        "Schedules": need({"lr": need(Component(SCHEDULES, ("timeline",))), "*": Component(SCHEDULES, ("timeline",))}),
        "Optimizer": need(Component(OPTIMIZERS, ("groups",))),
        "DataLoader": need({"Train": _train_data(training), "Eval": _data()}),
        "Evaluators": [EVALUATORS],
        "Export": {"export_type": Literal["paddle", "onnx"], "input_shape": list},
    }
