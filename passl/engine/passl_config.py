"""Reads the configurations that PASSL publishes for its DINO linear probes; nothing else knows their form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passl.config import Component, Config, ConfigError, Required, check
from passl.registry import SCHEDULES

# PASSL's name of a backbone -> ours and its patch size.
_BACKBONES = {
    "dino_deit_small16": ("vit_small", 16),
    "dino_deit_small8": ("vit_small", 8),
    "dino_vit_base16": ("vit_base", 16),
    "dino_vit_base8": ("vit_base", 8),
}
_SUFFIX = "_linearprobe"
_FIXED = {
    "task_type": "Classification",
    "train_loop": "ClassificationTrainingEpochLoop",
    "validate_loop": "ClassificationEvaluationLoop",
}


def is_passl(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` is in PASSL's form: it names one of PASSL's models."""
    name = (config.get("Model") or {}).get("name") if isinstance(config.get("Model"), Mapping) else None
    return isinstance(name, str) and name.endswith(_SUFFIX) and name[: -len(_SUFFIX)] in _BACKBONES


def translate(config: Config, training: bool = True) -> tuple[Config, list[str]]:
    """``config`` in passl's own form (one that is so already as it is), and all problems found on the way: keys that
    PASSL's linear probes do not have, values that contradict each other. ``training``: LRScheduler is required.
    """
    if not is_passl(config):
        return config, []
    translator = _Translator(config, training)
    return Config(translator.sections(), translator.sources), translator.problems


class _Translator:
    """Takes the sections apart and keeps count of what is wrong with them."""

    def __init__(self, config: Config, training: bool) -> None:
        self.config = config
        self.sources = dict(config.sources)
        self.training = training
        self.problems: list[str] = []

    def sections(self) -> dict[str, Any]:
        known = (
            "Global",
            "FP16",
            "DistributedStrategy",
            "Model",
            "Loss",
            "Metric",
            "LRScheduler",
            "Schedules",
            "Optimizer",
            "DataLoader",
            "Export",
            "EMA",
        )
        result = {
            key: value
            for key, value in self.config.items()
            if key not in known or key in ("FP16", "Optimizer", "Export", "Evaluators")
        }
        if self.config.get("EMA"):
            self.problem("EMA", "a linear probe keeps no moving average: remove the section")
        result["Global"] = self.global_section()
        result["Model"] = self.model()
        result["Schedules"] = self.schedules()
        result["DataLoader"] = self.loaders()
        self.losses_and_metrics()
        self.strategy()
        return result

    def problem(self, key: str, message: str) -> None:
        source = self.config.source(tuple(key.split(".")))
        self.problems.append(": ".join(filter(None, (source, key, message))))

    def mapping(self, key: str, value: Any) -> dict[str, Any]:
        if value is not None and not isinstance(value, Mapping):
            self.problem(key, f"must be a section of keys and values, got {value!r}")
            return {}
        return dict(value or {})

    def global_section(self) -> dict[str, Any]:
        section = self.mapping("Global", self.config.get("Global"))
        for key, expected in _FIXED.items():
            value = section.pop(key, expected)
            if value != expected:
                self.problem(f"Global.{key}", f"only {expected} is there for this model, got {value!r}")
        return {"name": self.config["Model"]["name"], **section}

    def model(self) -> dict[str, Any]:
        section = dict(self.config["Model"])
        expected_type = section.pop("name")[: -len(_SUFFIX)]
        backbone = self.mapping("Model.backbone", section.pop("backbone", None))
        kind = backbone.pop("type", expected_type)
        if kind != expected_type:
            self.problem("Model.backbone.type", f"{kind!r} does not belong to the model {expected_type + _SUFFIX!r}")
        name, patch_size = _BACKBONES[expected_type]
        if backbone.pop("patch_size", patch_size) != patch_size:
            self.problem("Model.backbone.patch_size", f"{expected_type} has patches of {patch_size}")
        backbone.pop("output_dim", None)  # PASSL's own classifier in the backbone, which a probe never uses
        class_num, num_classes = section.pop("class_num", None), section.pop("num_classes", None)
        if None not in (class_num, num_classes):
            self.problem("Model.num_classes", "Model.class_num says the same: give only one of them")
        self.moved("Model.num_classes", "Model.num_classes" if class_num is None else "Model.class_num")
        self.moved("Model.n_last_blocks", "Model.backbone.n_last_blocks")
        self.moved("Model.avgpool", "Model.backbone.avgpool_patchtokens")
        default_blocks, default_avgpool = (4, False) if name == "vit_small" else (1, True)
        result = {
            "name": "LinearProbe",
            "backbone": {"name": name, "patch_size": patch_size},
            "num_classes": next((value for value in (class_num, num_classes) if value is not None), 1000),
            "n_last_blocks": backbone.pop("n_last_blocks", default_blocks),
            "avgpool": backbone.pop("avgpool_patchtokens", default_avgpool),
        }
        for key in backbone:
            self.problem(f"Model.backbone.{key}", "no such key in PASSL's DINO backbones")
        for key in section:
            self.problem(f"Model.{key}", "no such key in PASSL's linear probes")
        return result

    def moved(self, key: str, old: str) -> None:
        """Says that the value at ``key`` was set where ``old`` was."""
        if source := self.config.source(tuple(old.split("."))):
            self.sources[tuple(key.split("."))] = source

    def schedules(self) -> dict[str, Any]:
        if "Schedules" in self.config:
            self.problem("Schedules", "PASSL's form has LRScheduler, not Schedules")
        # Checked here, under the name and from the place where the user has it.
        part = {key: value for key, value in self.config.items() if key == "LRScheduler"}
        schedule = Component(SCHEDULES, ("timeline",))
        try:
            check(Config(part, self.config.sources), {"LRScheduler": Required(schedule) if self.training else schedule})
        except ConfigError as error:
            self.problems += error.problems
            return {"lr": {"name": "Constant", "value": 0.0}}  # one that is right: the problem has been told
        return {"lr": self.config.get("LRScheduler")}

    def loaders(self) -> Any:
        loaders = {}
        for phase, section in self.mapping("DataLoader", self.config.get("DataLoader")).items():
            section = self.mapping(f"DataLoader.{phase}", section)
            sampler = self.mapping(f"DataLoader.{phase}.sampler", section.get("sampler"))
            if sampler.pop("name", "DistributedBatchSampler") != "DistributedBatchSampler":
                self.problem(f"DataLoader.{phase}.sampler.name", "only DistributedBatchSampler is there")
            loaders[phase] = {**section, "sampler": sampler}
        return loaders

    def losses_and_metrics(self) -> None:
        for section, name, allowed in (("Loss", "CELoss", {"weight": 1.0}), ("Metric", "TopkAcc", {"topk": [1, 5]})):
            for phase, items in self.mapping(section, self.config.get(section)).items():
                for item in items if isinstance(items, list) else filter(None, [items]):
                    if not isinstance(item, Mapping) or list(item) != [name]:
                        self.problem(f"{section}.{phase}", f"only {name} is there for a linear probe, got {item!r}")
                        continue
                    for key, value in self.mapping(f"{section}.{phase}.{name}", item[name]).items():
                        if allowed.get(key) != value:
                            self.problem(
                                f"{section}.{phase}", f"{name}.{key}: a linear probe has {allowed}, got {value!r}"
                            )

    def strategy(self) -> None:
        section = self.mapping("DistributedStrategy", self.config.get("DistributedStrategy"))
        if section.pop("data_parallel", True) is not True:
            self.problem("DistributedStrategy.data_parallel", "must be true")
        if section.pop("recompute", None):
            self.problem("DistributedStrategy.recompute", "a frozen backbone stores nothing to recompute: remove it")
        for key in section:
            self.problem(f"DistributedStrategy.{key}", "no such key")
