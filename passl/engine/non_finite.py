"""Losses and gradients that are infinite or no numbers: where they come from, and what becomes of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

import numpy as np
import paddle
from paddle import nn

from passl import distributed

_MOST_NAMES = 20


class NonFiniteLossError(RuntimeError):
    """A loss, gradient or weight became infinite or NaN; nothing was saved since the last good checkpoint."""


@dataclass(frozen=True)
class NonFinite:
    """``Global.non_finite``: what to do when the loss or a gradient is infinite or NaN.

    Args:
        policy: stop: end the run with a report. skip: leave the step out, as if its batch did not exist. fall_back: go
            on from the last good checkpoint with less to overflow: float16 becomes bfloat16 where the device has it,
            then float32, where the run stops after all.
        max_skipped: after so many skipped steps the run stops.
    """

    policy: Literal["stop", "skip", "fall_back"] = "stop"
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.policy not in ("stop", "skip", "fall_back"):
            raise ValueError(f"policy ({self.policy!r}) must be stop, skip or fall_back")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped ({self.max_skipped}) must be at least 0")


def explain(
    method: nn.Layer,
    parts: Sequence[Mapping[str, paddle.Tensor]],
    run: Callable[[Mapping[str, paddle.Tensor]], Mapping[str, paddle.Tensor]],
    describe: Callable[[int], str],
) -> str:
    """Which layer, and which samples, on which process: found by a second look at the step's batch.

    To be called by all processes at the same time; uses up the gradients and the method's running statistics.

    Args:
        parts: the micro-batches of the step on this process, before any of them was run.
        run: the forward pass of one, with the random numbers and the precision of the step.
        describe: the index of a sample -> its file.
    """
    found: list[str] = []
    for part in parts:
        # All of it on every process, whatever it finds: batch norms wait for those of the others.
        found += [text for look in (_in_forward, _in_backward) if (text := look(method, part, run, describe))]
    texts = distributed.gather_objects(found[0] if found else "")
    named = [f"process {rank}: {text}" if len(texts) > 1 else text for rank, text in enumerate(texts) if text]
    return "; ".join(named) or "a second look at the same batch found every output and gradient finite"


def _in_forward(method: nn.Layer, part: Mapping, run: Callable, describe: Callable[[int], str]) -> Optional[str]:
    first = [
        f"the input itself ({name}) is not finite, {_samples(rows, value, part, describe)}"
        for name, value in part.items()
        if name != "index" and (rows := _bad_rows(value)) is not None
    ]

    def watch(name: str) -> Callable:
        def look(layer: nn.Layer, inputs: Any, output: Any) -> None:
            for tensor in () if first else _tensors(output):
                if (rows := _bad_rows(tensor)) is not None:
                    first.append(
                        f"the first layer whose output is not finite is {name} ({type(layer).__name__}, "
                        f"{str(tensor.dtype).split('.')[-1]} {list(tensor.shape)}), "
                        f"{_samples(rows, tensor, part, describe)}"
                    )

        return look

    handles = [layer.register_forward_post_hook(watch(name)) for name, layer in method.named_sublayers()]
    try:
        with paddle.no_grad():
            outputs = run(part)
    finally:
        for handle in handles:
            handle.remove()
    bad = [name for name, value in outputs.items() if _bad_rows(value) is not None]
    if not first and bad:
        first.append(
            f"every layer's output is finite, and {', '.join(bad)} of {type(method).__name__} is not, "
            f"{_samples(None, None, part, describe)}"
        )
    return first[0] if first else None


def _in_backward(method: nn.Layer, part: Mapping, run: Callable, describe: Callable[[int], str]) -> Optional[str]:
    parameters = [(name, p) for name, p in method.named_parameters() if not p.stop_gradient]
    for _, parameter in parameters:
        parameter.clear_gradient(False)
    run(part)["loss"].backward()
    bad = [name for name, p in parameters if p.grad is not None and _bad_rows(p.grad) is not None]
    if not bad:
        return None
    # The gradients come from the end: the last of these layers is where it began.
    return (
        f"every output and the loss are finite, and the gradients of {len(bad)} parameters are not, from {bad[-1]} "
        f"on, {_samples(None, None, part, describe)}"
    )


def _tensors(output: Any) -> Iterator[paddle.Tensor]:
    if isinstance(output, paddle.Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))


def _bad_rows(tensor: paddle.Tensor) -> Optional[np.ndarray]:
    """Which rows [n] of a tensor [n, ...] hold an infinity or NaN; None if there are none."""
    if not tensor.is_floating_point():
        return None
    values = tensor.detach().astype("float32").numpy()
    bad = ~np.isfinite(values.reshape(values.shape[0] if values.ndim else 1, -1)).all(axis=1)
    return bad if bad.any() else None


def _samples(
    rows: Optional[np.ndarray], tensor: Optional[paddle.Tensor], part: Mapping, describe: Callable[[int], str]
) -> str:
    """The files behind ``rows`` of a tensor that holds V views of B samples, view by view; else of the whole batch."""
    indices = part["index"].numpy() if isinstance(part["index"], paddle.Tensor) else np.asarray(part["index"])
    if rows is not None and tensor.ndim and len(rows) % len(indices) == 0:
        concerned = rows.reshape(-1, len(indices)).any(axis=0)
        indices = indices[concerned]
    names = [describe(int(index)) for index in indices]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{len(names)} sample(s): {', '.join(names[:_MOST_NAMES])}{more}"
