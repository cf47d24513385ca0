"""Planning for GPUs that are not here: memory is counted, and time is not known unless it is told."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from passl.engine.plan import document, estimate, recipe
from passl.engine.plan.budget import shown_memory, shown_time
from passl.engine.plan.estimate import Length, TooShortError
from passl.engine.plan.job import LONG, MEMORY_SHARE, Draft, Job
from passl.engine.plan.recipe import Choices

_WORKERS = 10
_COUNTED = 1  # images
_USUAL_EPOCHS = 100


def plan(job: Job) -> Draft:
    """Raises PlanError when nothing fits."""
    machine = job.machine
    design = job.designs()[0]
    why = "as many as the official recipe has; the log says if they are too few"
    choices = job.choices(design, job.batch_size(), _WORKERS, why)
    found = _counted(job, choices)
    limit = MEMORY_SHARE * machine.memory
    part = choices.batch_size
    while part > 1 and estimate.gpu_memory(found, part, machine) > limit:
        part = math.ceil(part / 2)
    memory = estimate.gpu_memory(found, part, machine)
    if memory > limit:
        raise job.too_little(design, memory / MEMORY_SHARE, part)
    choices = replace(choices, accum_steps=math.ceil(choices.batch_size / part))
    length, time_fact = _length(job, choices)
    facts = [
        time_fact,
        f"Memory: about {shown_memory(memory)} of {shown_memory(machine.memory)} on each GPU. Not measured, but "
        f"estimated: {shown_memory(estimate.gpu_memory(found, 0, machine))} for CUDA, weights, gradients and the "
        f"moments of Adam, and {part} times {shown_memory(found['kept'])} that an image keeps for the backward pass, "
        "which was counted here in float32; in half precision 0.6 of it; 15 % on top.",
    ]
    return Draft(replace(choices, length=length), facts, length.seconds if job.request.rate else None, memory)


def _counted(job: Job, choices: Choices) -> dict[str, Any]:
    here = replace(job.machine, device="cpu", processes=1, dtype=None)
    tried = replace(choices, machine=here, batch_size=_COUNTED, lists=None, length=LONG, num_workers=0)
    config = document.config_of(recipe.settings(tried))
    found = job.prober.run(config, 1, f"{choices.design.name}, counting what an image keeps in memory", counts=True)
    job.say(f"  {shown_memory(found['kept'])} an image, {shown_memory(found['weights'])} of weights")
    return found


def _length(job: Job, choices: Choices) -> tuple[Length, str]:
    """Epochs, and what is known of the time."""
    most = estimate.most_epochs(job.images.readable)
    rate = job.request.rate
    if rate is None:
        epochs = min(most, _USUAL_EPOCHS)
        every = max(epochs // 10, 1) if choices.lists is not None else None
        return Length(epochs, every, 1, 0.0, False), (
            "Time: not known, as these GPUs are not here, so nothing was done to fit it. Make this plan on that "
            "machine without --gpus, or give --images-per-second, as `ips` in the log of a run there says."
        )
    # Features take one forward pass of one view; training about ten times as much.
    costs = estimate.Costs(60.0, choices.global_batch / rate, 10.0, job.scored / (5 * rate))
    try:
        length = estimate.length(costs, choices.steps_per_epoch, job.request.time, most)
    except TooShortError as error:
        raise job.too_short(error, choices.design, costs.step * choices.steps_per_epoch) from error
    return length, (
        f"Time: about {shown_time(length.seconds)} of {shown_time(job.request.time)}. Not measured, but from the "
        f"{rate:g} images/s that you gave; a minute to start and ten seconds to save are guessed."
    )
