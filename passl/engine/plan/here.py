"""Planning for this machine: trials decide."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Optional

from passl.engine.plan import document, estimate, recipe
from passl.engine.plan.budget import shown_memory, shown_time
from passl.engine.plan.designs import SIZES, Design
from passl.engine.plan.estimate import TooShortError
from passl.engine.plan.images import list_text
from passl.engine.plan.job import LONG, MEMORY_SHARE, Draft, Job, power_of_two
from passl.engine.plan.probing import OutOfMemoryError
from passl.engine.plan.recipe import Choices
from passl.engine.plan.trial import memory_of

# A larger network that sees the images less often learns less than a smaller one.
_WANTED_EPOCHS, _WANTED_EPOCHS_OF_LARGEST = 30, 100
_TRIAL_SECONDS, _SHORT_TRIAL_SECONDS = 15.0, 3.0
_LONGEST_TRIAL_SECONDS = 45.0
_MOST_STEPS = 60
_FEW_STEPS = 3
_FASTER = 4.0
_GAIN = 0.5  # of the time of an image, by larger batches, at best
_EVALUATING_SECONDS = 2.0
_FEW_SCORED, _MOST_SCORED = 8, 1000  # images of each list, in a trial


def plan(job: Job) -> Draft:
    """Raises PlanError when nothing fits."""
    found, choices = _try(job)
    costs = estimate.costs(found, choices.batch_size, job.scored)
    try:
        length = estimate.length(
            costs, choices.steps_per_epoch, job.request.time, estimate.most_epochs(job.images.readable)
        )
    except TooShortError as error:
        raise job.too_short(error, choices.design, costs.step * choices.steps_per_epoch) from error
    choices = replace(choices, length=length)
    memory = max(found["peak"], found["peak_evaluating"] if length.eval_every else 0.0)
    waited = 100 * sum(found["waits"][1:]) / max(sum(found["steps"][1:]), 1e-9)
    evaluating = f", {shown_time(costs.evaluating)} to evaluate" if job.scored else ""
    facts = [
        f"Time: about {shown_time(length.seconds)} of {shown_time(job.request.time)}. By a trial of "
        f"{len(found['steps'])} steps of {found['trial_size']} images: {shown_time(costs.step)} for a step of the "
        f"plan, {shown_time(costs.start)} to start, {shown_time(costs.saving)} to save{evaluating}.",
        f"Memory: about {shown_memory(memory)} for each process, by that trial; workers come on top.",
        f"Loading: {found['loading_rate']:.0f} images/s with {choices.num_workers} worker(s) when nothing else runs; "
        f"training takes {choices.batch_size / costs.step:.0f} images/s, and waited {waited:.0f} % of the time.",
    ]
    if job.machine.processes > 1:
        facts.append(f"Not measured, but assumed: that {job.machine.processes} processes are as fast as one is alone.")
    return Draft(choices, facts, length.seconds, memory)


def _try(job: Job) -> tuple[dict[str, Any], Choices]:
    """What a trial of the largest network measured for which there is time, and the choices it was made with."""
    too_high = 1.0  # how much nominal speeds are
    *larger, smallest = job.designs()
    for design in larger:
        if _epochs(job, too_high * design.nominal_seconds(job.machine)) < _wanted(design):
            continue
        choices, found = _small_trial(job, design)
        per_image = estimate.step_seconds(found) / choices.batch_size / job.machine.processes
        too_high = max(per_image / design.nominal_seconds(job.machine), 1.0)
        if _epochs(job, per_image) >= _wanted(design):
            return _sized(job, choices, found)
        job.say(f"  {_epochs(job, per_image):.1f} epochs in {shown_time(job.request.time)}: try a smaller network")
    _check_operations(job, smallest)
    batch_size = job.batch_size()
    if _small_batch(job, smallest) < batch_size:
        return _sized(job, *_small_trial(job, smallest))
    return _sized(job, job.choices(smallest, batch_size, *job.workers(smallest)), None)


def _epochs(job: Job, seconds_per_image: float) -> float:
    """How many fit the time."""
    return job.request.time / (seconds_per_image * job.images.count)


def _wanted(design: Design) -> int:
    return _WANTED_EPOCHS_OF_LARGEST if design.level == len(SIZES) - 1 else _WANTED_EPOCHS


def _small_batch(job: Job, design: Design) -> int:
    """Images that take about a second at nominal speed, and so some seconds at most."""
    second = 0.25 / design.nominal_seconds(replace(job.machine, processes=1))
    return min(max(power_of_two(second), 2), job.batch_size())


def _small_trial(job: Job, design: Design) -> tuple[Choices, dict[str, Any]]:
    choices = job.choices(design, _small_batch(job, design), *job.workers(design))
    try:
        return choices, _trial(job, choices, _FEW_STEPS)
    except OutOfMemoryError as error:
        raise job.too_little(design, None, choices.batch_size) from error


def _sized(job: Job, choices: Choices, found: Optional[dict[str, Any]]) -> tuple[dict[str, Any], Choices]:
    """A longer trial at the batch of the plan, in parts that memory holds. ``found``: by a trial of ``choices``.

    What steps and memory a trial with fewer images measured is returned for the batch of the plan.
    """
    limit = MEMORY_SHARE * job.machine.memory
    own = memory_of("self") or 0.0
    if job.machine.device == "cpu" and own > limit:
        # Paddle alone is this large already.
        raise job.too_little(choices.design, own / MEMORY_SHARE, 1)
    batch = part = job.batch_size()
    size, steps = batch, _guessed_steps(job, choices.design, batch)
    if found is not None:
        _check_time(job, choices, found)
        while part > 1 and estimate.predicted_peak(found, choices.batch_size, part) > limit:
            part = math.ceil(part / 2)
        size, steps = _trial_size(job, choices, found)
        if size == choices.batch_size and found["peak"] <= limit:
            return _scaled(found, size, batch, part), replace(choices, batch_size=batch, accum_steps=batch // part)
    while True:
        part = min(part, size)
        choices = replace(choices, batch_size=size, accum_steps=math.ceil(size / part))
        try:
            measured = _trial(job, choices, steps)
            if measured["peak"] <= limit:
                final = replace(choices, batch_size=batch, accum_steps=math.ceil(batch / part))
                return _scaled(measured, size, batch, part), final
            problem = f"{shown_memory(measured['peak'])} are more than there is"
        except OutOfMemoryError as error:
            measured, problem = None, str(error)
        if part == 1:
            raise job.too_little(choices.design, measured and measured["peak"] / MEMORY_SHARE, 1)
        job.say(f"  {problem}: half as many images at a time")
        part = math.ceil(part / 2)


def _guessed_steps(job: Job, design: Design, batch: int) -> int:
    """Of a trial without one before it; machines are some times slower than nominal ones."""
    seconds = _FASTER * batch * design.nominal_seconds(replace(job.machine, processes=1))
    return min(max(int(_TRIAL_SECONDS / seconds), 2 * _FEW_STEPS), _MOST_STEPS)


def _check_operations(job: Job, design: Design) -> None:
    """Raises PlanError when a machine several times as fast as any would need too long for one epoch."""
    epoch = design.nominal_seconds(job.machine) * job.images.count
    if design.tera is not None and epoch > _FASTER * job.request.time:
        raise job.too_short(TooShortError(epoch), design, epoch, "by its operations ")


def _check_time(job: Job, choices: Choices, found: dict[str, Any]) -> None:
    """Raises PlanError when one epoch takes much too long, whatever larger batches gain."""
    costs = estimate.costs(found, choices.batch_size, 0)
    epoch = job.images.count / (choices.batch_size * job.machine.processes) * costs.step
    if epoch * _GAIN > job.request.time:
        raise job.too_short(TooShortError(estimate.least(costs, epoch)), choices.design, epoch)


def _trial_size(job: Job, choices: Choices, found: dict[str, Any]) -> tuple[int, int]:
    """Images in a step of the longer trial, the plan's or as many as do not take minutes, and steps."""
    size = job.batch_size()
    per_image = estimate.step_seconds(found) / choices.batch_size
    while size > choices.batch_size and 2 * size * per_image > _LONGEST_TRIAL_SECONDS:
        size //= 2
    wanted = min(_TRIAL_SECONDS, max(job.request.time / 4, _SHORT_TRIAL_SECONDS)) / (size * per_image)
    steady = _FEW_STEPS + 2 * choices.num_workers  # by then batches made ahead are used up
    fitting = _LONGEST_TRIAL_SECONDS / (size * per_image)
    return size, max(min(max(round(wanted), steady), int(fitting), _MOST_STEPS), 2)


def _scaled(found: dict[str, Any], size: int, batch: int, part: int) -> dict[str, Any]:
    """A trial with ``size`` images in a step as one with ``batch``, of which ``part`` are in memory at a time."""
    ratio = batch / size
    return {
        **found,
        "steps": [ratio * seconds for seconds in found["steps"]],
        "waits": [ratio * seconds for seconds in found["waits"]],
        "peak": estimate.predicted_peak(found, size, part) if part > size else found["peak"],
        "trial_size": size,
    }


def _trial(job: Job, choices: Choices, steps: int) -> dict[str, Any]:
    """A trial in one process, with short lists for k-NN: a few images, and more, to tell what each of them takes."""
    tried = replace(choices, machine=replace(job.machine, processes=1), length=LONG)
    config = document.config_of(recipe.settings(tried))
    if choices.lists is not None and job.images.labelled is not None:
        nominal = choices.design.nominal_seconds(replace(job.machine, processes=1))
        many = min(max(int(_EVALUATING_SECONDS / nominal), 4 * _FEW_SCORED), _MOST_SCORED)
        evaluators = []
        for count in (_FEW_SCORED, many):
            files = {"bank": job.images.labelled.bank, "validation": job.images.labelled.validation}
            for name, rows in files.items():
                text = list_text(rows[:count])
                (job.folder / f"{name}{count}.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
            lists = (job.folder / f"bank{count}.csv", job.folder / f"validation{count}.csv")
            evaluators += document.config_of(recipe.settings(replace(tried, lists=lists)))["Evaluators"]
        config["Evaluators"] = evaluators
    parts = f" in {choices.accum_steps} parts" if choices.accum_steps > 1 else ""
    found = job.prober.run(
        config, steps, f"{choices.design.name}, {choices.batch_size} images a step{parts}, {steps} steps"
    )
    job.say(f"  {shown_time(estimate.step_seconds(found))} a step, {shown_memory(found['peak'])} of memory")
    return found
