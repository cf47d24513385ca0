"""The settings behind each verdict, with their present values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passl.doctor.runs import Run

# Our key -> the flag of the official code.
_OFFICIAL = {
    "Schedules.teacher_temp": "--teacher_temp and --warmup_teacher_temp",
    "Schedules.lr": "--lr",
    "Schedules.lr.warmup": "--warmup_epochs",
    "Schedules.teacher_momentum": "--momentum_teacher",
    "Optimizer.clip_norm": "--clip_grad",
    "Model.freeze_last_layer": "--freeze_last_layer",
    "Model.head.norm_last_layer": "--norm_last_layer",
    "Model.head.use_bn": "--use_bn_in_head",
    "Model.head.out_dim": "--out_dim",
    "FP16.level": "--use_fp16",
    "DataLoader.Train.dataset": "--data_path",
    "DataLoader.Train.loader.num_workers": "--num_workers",
}
_DEFAULTS = {
    "Model.student_temp": 0.1,
    "Model.center_momentum": 0.9,
    "Model.freeze_last_layer": 1,
    "Model.head.use_bn": False,
    "Model.backbone.init_std": 0.02,
    "Model.head.norm_last_layer": True,
    "DataLoader.Train.loader.num_workers": 4,
}
# What a schedule's height is called, by the kind of schedule.
_HEIGHTS = ("base", "value", "learning_rate")


def setting(run: Run, key: str) -> Any:
    """The present value, or the default if a configuration is known and says nothing; None: unknown."""
    if key in run.settings:
        return run.settings[key]
    return _DEFAULTS.get(key) if run.settings else None


def name(run: Run, key: str) -> str:
    """The key as the user types it, with the present value where that is known."""
    if run.is_official:
        return _OFFICIAL.get(key, key)
    key = height(run, key)
    present = setting(run, key)
    return key if present is None else f"{key} (now {_shown(present)})"


def height(run: Run, key: str) -> str:
    """The key under which a schedule's height is set; `key` itself where there is none."""
    return next((f"{key}.{word}" for word in _HEIGHTS if f"{key}.{word}" in run.settings), key)


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value}"


def against_uniform(run: Run, visit: Mapping[str, Any]) -> list[str]:
    """Ways out of ln(out_dim), the likeliest first."""
    lines = []
    teacher, student = visit.get("teacher_temp"), visit.get("student_temp")
    sharpen = f"{name(run, 'Schedules.teacher_temp')}: lower to 0.04, well below the student's temperature"
    if teacher is None or student is None or teacher > 0.4 * student:
        lines.append(f"{sharpen} ({_shown(setting(run, 'Model.student_temp') or student or 0.1)})")
    if setting(run, "Model.head.use_bn") is not True:
        lines.append(f"{name(run, 'Model.head.use_bn')}: true, where the run is short or the network small")
    kind, width = str(setting(run, "Model.backbone.name")), setting(run, "Model.backbone.init_std")
    if kind.lower().startswith(("vit", "visiontransformer")) and (width or 0.02) < 0.05:
        lines.append(f"{name(run, 'Model.backbone.init_std')}: 0.1, in a small transformer that starts from nothing")
    lines += [
        f"{name(run, 'Schedules.lr')}: halve it, or lengthen {name(run, 'Schedules.lr.warmup')}",
        f"{name(run, 'Model.freeze_last_layer')}: keep the last layer fixed for more epochs",
    ]
    if setting(run, "Model.head.norm_last_layer") is not True:
        lines.append(f"{name(run, 'Model.head.norm_last_layer')}: true")
    lines.append(f"{name(run, 'Model.head.out_dim')}: fewer prototypes for a small data set")
    return lines


def against_one_hot(run: Run) -> list[str]:
    lines = []
    if not run.is_official:
        lines.append(f"{name(run, 'Model.center_momentum')}: 0.9; with 1.0 the centre never moves")
    return [
        *lines,
        f"{name(run, 'Schedules.teacher_temp')}: raise towards 0.07, if it is below 0.04",
        f"{name(run, 'Schedules.teacher_momentum')}: nearer to 1, so that the teacher follows more slowly",
        f"{name(run, 'Schedules.lr')}: halve it",
    ]


def against_instability(run: Run) -> list[str]:
    lines = [
        f"{name(run, 'Schedules.lr')}: divide by 10, then look for the largest that holds",
        f"{name(run, 'Schedules.lr.warmup')}: lengthen it",
    ]
    clip = setting(run, "Optimizer.clip_norm")
    goal = "set 3.0" if clip is None and run.settings else "lower it, to 0.3 for example"
    lines.append(f"{name(run, 'Optimizer.clip_norm')}: {goal}")
    if run.settings.get("FP16.level") not in (None, "O0"):
        lines.append(f"{name(run, 'FP16.level')}: O0, or FP16.dtype: bfloat16")
    lines.append(f"{name(run, 'Model.freeze_last_layer')}: keep the last layer fixed for more epochs")
    return lines


def against_frozen_data(run: Run) -> list[str]:
    return [
        f"{name(run, 'DataLoader.Train.dataset.root')}: look at the images there; many must differ",
        "DataLoader.Train.dataset.transform: it must draw new crops for each sample (MultiCrop)",
    ]


def against_rest(run: Run) -> list[str]:
    return [
        f"{name(run, 'Schedules.lr')}: raise it; with AdamW 5e-4 for 256 images",
        f"{name(run, 'Schedules.lr.warmup')}: shorten it, if it is still going on",
        f"{name(run, 'Schedules.teacher_momentum')}: below 1, or the teacher stays what it was",
    ]


def against_waiting(run: Run) -> list[str]:
    return [
        f"{name(run, 'DataLoader.Train.loader.num_workers')}: as many as there are cores for this process",
        "DataLoader.Train.dataset.transform.backend: opencv, several times faster than pillow",
        "store the images smaller, on a local disk or in a tarball (docs/data.md)",
    ]
