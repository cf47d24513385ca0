"""What the two ways to plan share: the request, what is known of it by then, and errors that say what would do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from passl.data.errors import UnreadableImageError
from passl.engine import build
from passl.engine.plan import designs, document, recipe
from passl.engine.plan.budget import PlanError, shown_memory, shown_time, time_option
from passl.engine.plan.designs import Design
from passl.engine.plan.estimate import Length, TooShortError
from passl.engine.plan.images import FEWEST, Images
from passl.engine.plan.machine import Machine
from passl.engine.plan.probing import Prober
from passl.engine.plan.recipe import Choices
from passl.registry import DATASETS

MEMORY_SHARE = 0.9  # of what there is
_LARGEST_CPU_BATCH, _LARGEST_BATCH = 32, 512
_STEPS_PER_EPOCH = {"cpu": 8, "gpu": 20}  # at least
_TIMED = 12  # images
# The run that a trial is the beginning of.
LONG = Length(1000, 1, 1000, 0.0, False)


@dataclass(frozen=True)
class Request:
    """What is asked for. ``time``: seconds; ``rate``: images per second of the whole job, where that is known."""

    source: str
    time: float
    machine: Machine
    out: Path
    arch: Optional[str] = None
    patch_size: Optional[int] = None
    is_dense: bool = False
    rate: Optional[float] = None
    seed: int = 0
    force: bool = False


class Draft(NamedTuple):
    """A plan before it is written. ``seconds``: None where that is not known; ``memory``: bytes of each process."""

    choices: Choices
    facts: list[str]
    seconds: Optional[float]
    memory: float


class Job:
    """A request, its images, and where trials run. ``lists``: files of the images for k-NN, beside the plan."""

    def __init__(
        self, request: Request, images: Images, lists: tuple[Path, Path], folder: Path, say: Callable[[str], None]
    ) -> None:
        self.request = request
        self.machine = request.machine
        self.images = images
        self.lists = lists if images.labelled is not None else None
        self.folder = folder
        self.say = say
        self.prober = Prober(folder, request.machine.memory if request.machine.device == "cpu" else None, say)

    @property
    def scored(self) -> int:
        """Images of one evaluation."""
        labelled = self.images.labelled
        return 0 if labelled is None else len(labelled.bank) + len(labelled.validation)

    def choices(self, design: Design, batch_size: int, num_workers: int, waits: str) -> Choices:
        request = self.request
        output = f"./output/{request.out.stem}"
        return Choices(
            self.images, self.machine, design, batch_size, 1, num_workers, waits, LONG, request.time, request.seed,
            output, self.lists,
        )  # fmt: skip

    def designs(self) -> list[Design]:
        """The networks that come into question, the largest first."""
        request, side = self.request, self.images.side
        if request.arch is not None:
            return [designs.named(request.arch, side, request.patch_size, request.is_dense)]
        return designs.candidates(self.images, self.machine, request.patch_size, request.is_dense)

    def batch_size(self) -> int:
        """Images per process and step.

        Raises:
            PlanError: there are more processes than images.
        """
        machine, count = self.machine, self.images.count
        if machine.processes > count:
            raise PlanError(f"{machine.processes} GPUs and {count} images: each needs one at least. Give fewer --gpus")
        most = _LARGEST_CPU_BATCH if machine.device == "cpu" else _LARGEST_BATCH
        whole = min(most, max(power_of_two(count / _STEPS_PER_EPOCH[machine.device]), min(FEWEST, count)))
        return max(power_of_two(whole / machine.processes), 1)

    def workers(self, design: Design) -> tuple[int, str]:
        """How many workers feed a process of this machine, and why."""
        cores = self.machine.cores
        loading = self._loading_seconds(design)
        # How many cores it takes to be as fast as the training can be.
        wanted = loading / design.nominal_seconds(replace(self.machine, processes=1))
        rate = f"a core makes the views of {1 / max(loading, 1e-9):.0f} images/s"
        if self.machine.device == "cpu":
            number = min(max(round(wanted), 1), max(cores // 2, 1))
            return number, f"{rate}; workers share the {cores} core(s) with the training"
        number = min(max(math.ceil(1.2 * min(wanted, cores)), 2), cores)
        return number, f"{rate}; each process has {cores} core(s), and a GPU takes more than one makes"

    def _loading_seconds(self, design: Design) -> float:
        """Seconds that one core needs for the views of an image."""
        config = document.config_of(recipe.settings(self.choices(design, 1, 0, "")))
        dataset: Any = build.component(config["DataLoader"]["Train"]["dataset"], DATASETS, "DataLoader.Train.dataset")
        count, started = 0, time.perf_counter()
        for index in np.linspace(0, len(dataset) - 1, _TIMED + 1).astype(int):
            try:
                dataset.sample(int(index), np.random.default_rng(0))
            except UnreadableImageError:
                continue
            if count == 0:
                started = time.perf_counter()  # the first one loads libraries
            count += 1
        return (time.perf_counter() - started) / max(count - 1, 1)

    def too_short(self, error: TooShortError, design: Design, epoch: float, how: str = "") -> PlanError:
        """``epoch``: seconds that one takes. how: that is known."""
        thirty = time_option((error.seconds + 29 * epoch) * 1.1)
        remedies = [f"--time {time_option(error.seconds * 1.05)} for one epoch, or {thirty} for 30"]
        if self.request.arch is not None:
            for other in designs.smaller(design, self.images.side):
                ratio = designs.relative_cost(other, design)
                if ratio is not None and error.seconds + epoch * (ratio - 1) < self.request.time:
                    remedies.append(f"--arch {other.name}, whose epoch should take {shown_time(epoch * ratio)}")
            remedies.append("no --arch: the plan then takes a network that fits")
        remedies.append("fewer images")
        return PlanError(
            f"{shown_time(self.request.time)} is too short: one epoch of {design.name} over {self.images.count} images "
            f"takes {how}{shown_time(epoch)}, with starting, saving and a tenth in reserve "
            f"{shown_time(error.seconds)}. What would do: {'; '.join(remedies)}"
        )

    def too_little(self, design: Design, needed: Optional[float], num_images: int) -> PlanError:
        """``needed``: bytes, for so many images at a time."""
        remedies = [f"--arch {other.name}" for other in designs.smaller(design, self.images.side)[:2]]
        if self.request.patch_size is not None and self.request.patch_size < 16:
            remedies.append("a larger --patch-size")
        remedies.append("more memory")
        much = f"needs about {shown_memory(needed)}" if needed else "needs more"
        return PlanError(
            f"{shown_memory(self.machine.memory)} of memory are too little: {design.name} with {num_images} image(s) "
            f"at a time {much}. What would do: {', or '.join(remedies)}"
        )


def power_of_two(value: float) -> int:
    """The largest one that is not above ``value``; 0 below 1."""
    return 2 ** math.floor(math.log2(value)) if value >= 1 else 0
