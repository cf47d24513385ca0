"""From a request to a plan: look, try, decide, check, write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from passl.config import Config, ConfigError
from passl.engine import run
from passl.engine.plan import document, elsewhere, here, recipe
from passl.engine.plan.budget import PlanError, shown_time
from passl.engine.plan.images import Labelled, list_text, look
from passl.engine.plan.job import Draft, Job, Request
from passl.engine.plan.recipe import Choices, Setting
from passl.formats.atomic import replacing

_FEW_IMAGES, _FEW_STEPS, _FREE_DISK = 1000, 500, 2**30


@dataclass(frozen=True)
class Plan:
    """A finished plan.

    Attributes:
        settings: with reasons. facts: what was estimated, and how, in lines.
        seconds: how long the run takes; None: not known. memory: bytes of each process.
        files: what was written.
    """

    settings: list[Setting]
    facts: list[str]
    seconds: Optional[float]
    memory: float
    files: list[Path]


def make_plan(request: Request, say: Callable[[str], None]) -> Plan:
    """``say`` shows lines of progress.

    Raises:
        PlanError: nothing sensible fits; says what would.
        OSError: the plan cannot be written.
    """
    stem = request.out.with_suffix("")
    lists = (stem.with_name(f"{stem.name}.knn_train.csv"), stem.with_name(f"{stem.name}.knn_val.csv"))
    _check_output(request, lists)
    say(f"looking at {request.source}")
    images = look(request.source, request.seed)
    say(
        f"  {images.count} images of about {images.height} x {images.width} pixels; {request.machine}; "
        f"{shown_time(request.time)}"
    )
    with tempfile.TemporaryDirectory(prefix="passl-plan-") as folder:
        job = Job(request, images, lists, Path(folder), say)
        draft = here.plan(job) if request.machine.is_here else elsewhere.plan(job)
    return _written(request, draft)


def _check_output(request: Request, lists: Sequence[Path]) -> None:
    """What would fail in the end fails before the trials."""
    out = request.out
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise PlanError(f"--out {out}: a plan is a file that ends in .yaml")
    for file in (out, *lists):
        if file.is_dir():
            raise PlanError(f"--out {out}: {file} is a folder")
        if file.exists() and not request.force:
            raise PlanError(f"{file} is there already: give another --out, or --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise PlanError(f"--out {out}: nothing can be written to {out.parent} ({error.strerror or error})") from error


def _written(request: Request, draft: Draft) -> Plan:
    """Check the plan as passl-train does, and write it."""
    choices = draft.choices
    if choices.length.eval_every is None:
        choices = replace(choices, lists=None)
    if draft.seconds is None:
        choices = replace(choices, budget=None)
    settings = recipe.settings(choices)
    try:
        run.checked(Config(document.config_of(settings), {(): str(request.out)}), training=True)
    except ConfigError as error:
        raise PlanError(f"no plan that would run: {error}") from error
    facts = [_command(request), *draft.facts, *(f"Mind: {warning}." for warning in _warnings(choices))]
    images = choices.images
    origin = (
        f"Made by passl-plan for {images.count} images of about {images.height} x {images.width} pixels in "
        f"{request.source}, for {request.machine} and {shown_time(request.time)}."
    )
    texts = {request.out: document.yaml_text(settings, [origin, *facts])}
    if choices.lists is not None and images.labelled is not None:
        texts.update(zip(choices.lists, _lists(images.labelled)))
    for file in reversed(texts):  # the plan last: it needs the lists
        with replacing(file) as target:
            target.write(texts[file].encode("utf-8", "surrogateescape"))
    return Plan(settings, facts, draft.seconds, draft.memory, list(texts))


def _lists(labelled: Labelled) -> tuple[str, str]:
    return list_text(labelled.bank), list_text(labelled.validation)


def _command(request: Request) -> str:
    command = f"passl-train -c {request.out}"
    if request.machine.processes == 1:
        return command
    devices = ",".join(str(number) for number in range(request.machine.processes))
    return f"python -m paddle.distributed.launch --devices {devices} $(which {command.replace(' ', ') ', 1)}"


def _warnings(choices: Choices) -> list[str]:
    images, found = choices.images, []
    if images.readable < _FEW_IMAGES:
        found.append(
            f"{images.readable} images are few; starting from weights that were trained on many "
            "(Global.pretrained_model) does more than training from scratch"
        )
    if choices.total_steps < _FEW_STEPS:
        found.append(f"{choices.total_steps} steps are few: this run shows that everything works, and learns little")
    if images.bad:
        found.append(
            f"{len(images.bad)} of {images.looked_at} images looked at cannot be read, such as "
            f"{images.bad[0][0]}: {images.bad[0][1]}"
        )
    if shutil.disk_usage(Path.cwd()).free < _FREE_DISK:
        found.append("less than 1 GB of disk is free here, where checkpoints go")
    return found
