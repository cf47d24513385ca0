"""The settings of a run, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from passl.engine.plan.budget import shown_time
from passl.engine.plan.designs import Design, is_convnet
from passl.engine.plan.estimate import Length
from passl.engine.plan.images import Images
from passl.engine.plan.machine import Machine

_SMALL_SET = 20_000
_SHORT_RUN = 1_500  # optimizer steps
_BOOSTED_EPOCHS = 300
_OFFICIAL_BATCH = 512


class Setting(NamedTuple):
    """A value of the configuration at the dotted ``key``, and why; without a reason it is shown in the file alone."""

    key: str
    value: Any
    reason: str = ""


@dataclass(frozen=True)
class Choices:
    """Everything that settings follow from.

    Attributes:
        batch_size: images per process and step, in ``accum_steps`` parts.
        lists: files of the images for k-NN: neighbours and validation.
        waits: why there are so many workers.
    """

    images: Images
    machine: Machine
    design: Design
    batch_size: int
    accum_steps: int
    num_workers: int
    waits: str
    length: Length
    budget: Optional[float]
    seed: int
    output_dir: str
    lists: Optional[tuple[Path, Path]] = None

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.machine.processes

    @property
    def steps_per_epoch(self) -> int:
        return self.images.count // self.global_batch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.length.epochs

    @property
    def is_small(self) -> bool:
        """Whether it is a run of the kind that ends in collapse with the recipe for ImageNet."""
        return self.design.is_narrow or self.machine.device == "cpu" or self.images.readable < _SMALL_SET

    @property
    def is_short(self) -> bool:
        return self.is_small and self.total_steps < _SHORT_RUN


def settings(choices: Choices) -> list[Setting]:
    """In the order of the file."""
    parts = (_global, _precision, _model, _schedules, _optimizer, _data, _evaluation)
    return [setting for part in parts for setting in part(choices)]


def _global(c: Choices) -> Iterator[Setting]:
    length = c.length
    if c.budget is None:
        why = "how long it takes is not known (see above): as many as this recipe is used with"
    elif length.is_capped:
        why = f"{shown_time(length.seconds)} of {shown_time(c.budget)}: more epochs over so few images bring little"
    else:
        why = f"the most that fit {shown_time(c.budget)}, with a tenth in reserve"
    yield Setting("Global.device", c.machine.device)
    yield Setting("Global.output_dir", c.output_dir)
    yield Setting("Global.seed", c.seed)
    yield Setting("Global.epochs", length.epochs, f"{why}; {c.total_steps} steps of {c.global_batch} images")
    if c.accum_steps > 1:
        micro = math.ceil(c.batch_size / c.accum_steps)
        yield Setting("Global.accum_steps", c.accum_steps,
                      f"memory holds {micro} images at a time: the batch is taken in {c.accum_steps} parts, with the "
                      "loss and centre of the whole; batch norms see one part at a time")  # fmt: skip
    yield Setting("Global.save_interval", length.save_every,
                  "epochs; the last is always saved. Saving takes at most 3 % of the time")  # fmt: skip
    yield Setting("Global.print_batch_step", min(max(c.steps_per_epoch // 10, 1), 50))
    if length.eval_every is None or c.lists is None:
        why = c.images.no_labels or "an evaluation would take too much of the time"
        yield Setting("Global.eval_during_train", False, f"no k-NN: {why}")
    else:
        yield Setting("Global.eval_interval", length.eval_every,
                      "epochs; all evaluations take at most about a tenth of the time")  # fmt: skip


def _precision(c: Choices) -> Iterator[Setting]:
    if c.machine.device == "gpu":
        kind = "bfloat16 cannot overflow" if c.machine.dtype == "bfloat16" else "float16 runs on every GPU"
        yield Setting("FP16.level", "O1", "half precision per operation: about twice as fast, half the memory; head "
                      "and loss stay in float32")  # fmt: skip
        yield Setting("FP16.dtype", c.machine.dtype, kind)


def _model(c: Choices) -> Iterator[Setting]:
    design, images = c.design, c.images
    yield Setting("Model.name", "DINO")
    size = f"{images.readable} images"
    budget = f" and {shown_time(c.budget)}" if c.budget else ""
    why = f"the size for {size}{budget} on {c.machine}"
    if design.is_narrow:
        why += "; narrow networks start with wider weights (init_std = 1/sqrt(width)): they learn sooner"
    yield Setting("Model.backbone", design.backbone, why)
    head: dict[str, Any] = {"name": "DINOHead"}
    if design.is_narrow:
        head.update(hidden_dim=256, bottleneck_dim=64 if c.is_short else 128)
    yield Setting("Model.head", head)
    yield Setting("Model.head.out_dim", out_dim(images.readable),
                  "prototypes: about one for ten images, 65536 from ImageNet's size on; with more, most would stay "
                  "unused")  # fmt: skip
    boosted = not c.is_small and c.length.epochs >= _BOOSTED_EPOCHS and not is_convnet(design)
    yield Setting("Model.head.norm_last_layer", not boosted,
                  "false: better in long runs, as the official boosted recipe" if boosted else
                  "prototypes of length 1: more stable")  # fmt: skip
    if c.is_small:
        yield Setting("Model.head.use_bn", True,
                      "batch norm in the head: without it short runs of small networks end at the uniform loss "
                      "ln(out_dim)")  # fmt: skip
        why = "epochs, all of them: prototypes stay as drawn, which keeps short runs from collapse"
        yield Setting("Model.freeze_last_layer", c.length.epochs, why)
    else:
        yield Setting("Model.head.use_bn", False, "as in the official recipe for so many images")
        yield Setting("Model.freeze_last_layer", 1, "epochs; the official value. Raise it if the loss does not fall")


def out_dim(count: int) -> int:
    if count >= 500_000:
        return 65536
    return 2 ** min(max(round(math.log2(max(count / 10, 1))), 8), 16)


def _schedules(c: Choices) -> Iterator[Setting]:
    base, why = _learning_rate(c)
    warmup = "10ep" if c.length.epochs >= 100 else "10%"
    yield Setting("Schedules.lr",
                  {"name": "Cosine", "base": base, "final": 1e-6, "warmup": warmup, "reference_batch_size": 256},
                  f"base * {c.global_batch} / 256 = {base * c.global_batch / 256:.2g} at the peak (the linear rule): "
                  f"{why}; warm-up over a tenth, at most ten epochs of a long run")  # fmt: skip
    if is_convnet(c.design):
        yield Setting("Schedules.weight_decay", {"name": "Constant", "value": 1e-4}, "as the official convnets")
    elif c.is_small:
        yield Setting("Schedules.weight_decay", {"name": "Constant", "value": 0.04},
                      "constant: the official rise to 0.4 is for long runs")  # fmt: skip
    else:
        yield Setting("Schedules.weight_decay", {"name": "Cosine", "base": 0.04, "final": 0.4}, "as the official one")
    momentum, why = _momentum(c)
    yield Setting("Schedules.teacher_momentum", {"name": "Cosine", "base": momentum, "final": 1.0}, why)
    yield from _temperature(c)


def _learning_rate(c: Choices) -> tuple[float, str]:
    if is_convnet(c.design):
        return 0.03, "the official one of convnets with SGD"
    if c.is_short and c.design.is_narrow:
        return 1.6e-2, "a high one, as a narrow network has few steps"
    if c.design.is_narrow:
        return 4e-3, "narrow networks take more than the official 5e-4"
    if c.is_small and c.design.name == "vit_tiny":
        return 2e-3, "small batches take more than the official 5e-4"
    return 5e-4, "the official one"


def _momentum(c: Choices) -> tuple[float, str]:
    batch, steps = c.global_batch, c.total_steps
    if batch >= _OFFICIAL_BATCH:
        momentum, why = 0.996, f"the official value for batches from {_OFFICIAL_BATCH} on"
    else:
        momentum, why = 0.9995, f"slow, as small batches ({batch}) need: the official advice for 256"
    most = max(1.0 - 5.0 / max(steps, 1), 0.9)
    if momentum > most:
        momentum = round(most, 4)
        why = f"{why}, but no slower than this, for the teacher to follow within a fifth of these {steps} steps"
    return momentum, why


def _temperature(c: Choices) -> Iterator[Setting]:
    value: dict[str, Any] = {"name": "Constant", "value": 0.04}
    if not c.is_small and c.length.epochs >= _BOOSTED_EPOCHS and not is_convnet(c.design):
        value = {"name": "Cosine", "base": 0.07, "final": 0.07, "warmup": "30ep", "warmup_start": 0.04,
                 "per_epoch": True}  # fmt: skip
        why = "0.04, rising to 0.07 over 30 epochs: the official boosted recipe"
    elif c.is_short:
        value = {"name": "Constant", "value": 0.03}
        why = "sharper than the official 0.04, as the run is short; no warm-up, as it does not rise"
    else:
        why = "the official start, which is safe; no warm-up, as it does not rise (0.07 pays in runs of 300 epochs)"
    yield Setting("Schedules.teacher_temp", value, why)
    yield Setting("Model.student_temp", 0.1, "the official value")


def _optimizer(c: Choices) -> Iterator[Setting]:
    if is_convnet(c.design):
        value = {"name": "SGD", "momentum": 0.9, "clip_norm": 3.0, "clip_mode": "each"}
        yield Setting("Optimizer", value, "SGD for convnets, as the official ones")
    else:
        yield Setting("Optimizer", {"name": "AdamW", "clip_norm": 3.0, "clip_mode": "each"}, "as the official one")


def _data(c: Choices) -> Iterator[Setting]:
    design, images = c.design, c.images
    yield Setting("DataLoader.Train.dataset", images.dataset)
    if images.bad:
        expected = images.count - images.readable
        yield Setting("DataLoader.Train.dataset.max_bad_samples", 2 * expected + 10,
                      f"{len(images.bad)} of {images.looked_at} images looked at cannot be read: others take their "
                      "place, up to so many")  # fmt: skip
    yield Setting("DataLoader.Train.dataset.transform", {"name": "MultiCrop"})
    transform = "DataLoader.Train.dataset.transform"
    multiple = f"; a multiple of the patch size, {design.patch_size}" if not is_convnet(design) else ""
    yield Setting(f"{transform}.global_crops_size", design.global_size,
                  f"the usual image has {images.height} x {images.width} pixels{multiple}"
                  + ("; small views for a small network" if design.global_size < 0.8 * min(images.side, 224) else "")
                  )  # fmt: skip
    yield Setting(
        f"{transform}.local_crops_size",
        design.local_size,
        "about half of the global ones, so most steps' work is cheap",
    )
    why = "the official number" if design.num_local == 8 else "fewer than the official 8: more steps instead"
    yield Setting(f"{transform}.num_local_crops", design.num_local, why)
    global_scale, local_scale, why = [0.4, 1.0], [0.05, 0.4], "the official shares of the image's area"
    if is_convnet(design):
        global_scale, local_scale, why = [0.14, 1.0], [0.05, 0.14], "those of the official convnets"
    elif c.is_small:
        global_scale, local_scale = [0.5, 1.0], [0.2 if c.is_short else 0.15, 0.5]
        why = "large crops: easier to match, for a small run"
    yield Setting(f"{transform}.global_crops_scale", global_scale, why)
    yield Setting(f"{transform}.local_crops_scale", local_scale)
    if c.is_short and design.is_narrow:
        why = "colours turned at will: so few steps would learn little else. Lower these if colours tell your classes"
        yield Setting(f"{transform}.jitter_prob", 1.0, why)
        for name, value in (("saturation", 0.8), ("hue", 0.5), ("gray_prob", 0.4)):
            yield Setting(f"{transform}.{name}", value)
    if design.global_size < 96:
        why = "off: a blur of up to 2 pixels and solarisation leave little of small views"
        yield Setting(f"{transform}.global_blur_probs", [0.0, 0.0], why)
        yield Setting(f"{transform}.local_blur_prob", 0.0)
        yield Setting(f"{transform}.global_solarize_probs", [0.0, 0.0])
    yield Setting("DataLoader.Train.sampler.batch_size", c.batch_size, _batch_reason(c))
    yield Setting("DataLoader.Train.loader.num_workers", c.num_workers, c.waits)


def _batch_reason(c: Choices) -> str:
    if c.machine.device == "cpu":
        return "small steps, and many of them: a CPU has no gain from larger ones" + (
            "" if c.batch_size >= 32 else f"; {c.steps_per_epoch} in an epoch of {c.images.readable} images"
        )
    whole = f" ({c.global_batch} on {c.machine.processes} processes)" if c.machine.processes > 1 else ""
    if c.global_batch >= _OFFICIAL_BATCH:
        return f"per process{whole}: the official global batch"
    return f"per process{whole}: at least 20 steps in an epoch of {c.images.readable} images"


def _evaluation(c: Choices) -> Iterator[Setting]:
    if c.lists is None or c.images.labelled is None:
        return
    labelled, side = c.images.labelled, c.design.global_size
    # The official 256 of 224, where the images have so much.
    resized = round(side * 256 / 224) if c.images.side > side else side
    transform = [
        {"Resize": {"size": resized, "interpolation": "bicubic"}},
        {"CenterCrop": {"size": side}},
        {"ToTensor": {}},
        {"Normalize": {}},
    ]
    bank, validation = (
        {"name": "ImageList", "list_file": str(path), "transform": transform, "max_bad_samples": len(rows)}
        for path, rows in zip(c.lists, (labelled.bank, labelled.validation))
    )
    knn = {
        "name": "KNN",
        "k": [k for k in (10, 20, 100, 200) if k <= len(labelled.bank)],
        "batch_size": 64,
        "num_workers": c.num_workers,
        "train_dataset": bank,
        "val_dataset": validation,
    }
    yield Setting("Evaluators", [knn],
                  f"k-NN of the teacher: {len(labelled.validation)} images of {labelled.classes} classes, "
                  f"{labelled.origin}; {len(labelled.bank)} neighbours")  # fmt: skip
