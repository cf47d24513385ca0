"""The optimizer of an official run <-> passl's: moments by the name of their parameter in place of its number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from passl.convert.layout import Slot
from passl.convert.report import ConversionError

# The tensors that PyTorch's optimizers keep of a parameter, and the suffixes of the same here.
_TENSORS = {
    "AdamW": {"exp_avg": "_moment1_0", "exp_avg_sq": "_moment2_0"},
    "Momentum": {"momentum_buffer": "_velocity_0"},
    "LARS": {"mu": "_velocity_0"},
}
_POWERS = ("_beta1_pow_acc_0", "_beta2_pow_acc_0")
_BETAS = (0.9, 0.999)


class OptimizerState(NamedTuple):
    """entries: of a ``.pdopt`` file. steps: how many the run has taken, None where its optimizer does not count.

    behind: how many fewer a parameter has taken, where that is so: a last layer that was frozen at first.
    """

    entries: dict[str, Any]
    steps: Optional[int]
    behind: dict[str, int]


def from_official(state: Mapping[str, Any], parameters: Sequence[Slot]) -> OptimizerState:
    """``optimizer.state_dict()`` of PyTorch as passl's; ``parameters``: the student's, in PyTorch's order.

    Raises:
        ConversionError: the state is of other parameters, or of an optimizer that is not known here.
    """
    ordered = _in_groups(state, parameters)
    entries: dict[str, Any] = {}
    taken: dict[str, int] = {}
    for index, values in state["state"].items():
        if not isinstance(index, int) or not 0 <= index < len(ordered):
            raise ConversionError(f"the optimizer has a state of parameter {index!r}, and there are {len(ordered)}")
        slot = ordered[index]
        if all(value is None for value in values.values()):
            continue
        name = next((n for n, tensors in _TENSORS.items() if all(values.get(k) is not None for k in tensors)), None)
        if name is None:
            raise ConversionError(f"the optimizer keeps {', '.join(map(str, values))} of {slot.torch_name}: unknown")
        if entries.setdefault("optimizer", name) != name:
            raise ConversionError(f"the optimizer's state is of {entries['optimizer']} and {name} at once")
        for there, here in _TENSORS[name].items():
            if values[there].shape != slot.torch_shape:
                raise ConversionError(
                    f"the optimizer's {there} of {slot.torch_name} has shape {list(values[there].shape)}, not "
                    f"{list(slot.torch_shape)}"
                )
            entries[slot.name + here] = slot.from_torch(values[there])
        if name == "AdamW":
            taken[slot.name] = int(np.asarray(values["step"]).item())
            for suffix, beta in zip(_POWERS, _betas(state)):
                # Paddle keeps the power that the next step uses.
                entries[slot.name + suffix] = np.array([beta ** (taken[slot.name] + 1)], np.float32)
    if not entries:
        raise ConversionError("the optimizer has not taken a step yet")
    steps = max(taken.values(), default=None)
    return OptimizerState(entries, steps, {name: steps - n for name, n in taken.items() if steps and n < steps})


def _betas(state: Mapping[str, Any]) -> tuple[float, float]:
    return tuple(map(float, state["param_groups"][0].get("betas", _BETAS)))  # type: ignore[return-value]


def _in_groups(state: Mapping[str, Any], parameters: Sequence[Slot]) -> list[Slot]:
    """The parameters by their numbers: first the regularised, then the others, as the official groups have them."""
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state.get("state"), Mapping):
        raise ConversionError("the optimizer's state is not that of PyTorch (param_groups, state)")
    lengths = [len(group["params"]) for group in groups]
    for frozen_gain in (False, True):
        trained = [slot for slot in parameters if not (frozen_gain and slot.torch_name.endswith("last_layer.weight_g"))]
        found = grouped_parameters(trained)
        if [len(group) for group in found] == lengths:
            numbers = [number for group in groups for number in group["params"]]
            if numbers != list(range(len(numbers))):
                raise ConversionError("the optimizer numbers its parameters in another order than the official code")
            return [slot for group in found for slot in group]
    raise ConversionError(
        f"the optimizer has groups of {lengths} parameters, and the student {len(parameters)} parameters in the "
        f"official groups of {[len(group) for group in grouped_parameters(parameters)]}"
    )


def grouped_parameters(parameters: Sequence[Slot]) -> tuple[list[Slot], list[Slot]]:
    """The official groups: regularised, and not (biases and 1-D parameters, by PyTorch's shapes)."""
    groups: tuple[list[Slot], list[Slot]] = ([], [])
    for slot in parameters:
        groups[slot.torch_name.endswith(".bias") or len(slot.torch_shape) == 1].append(slot)
    return groups


def to_official(
    entries: Mapping[str, Any], parameters: Sequence[Slot], steps: int, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """The opposite of :func:`from_official`. ``origin``: what only an official run knows, where it was one
    (``param_groups``, ``steps_behind``, ``counts_in_int``).
    """
    kind = str(entries.get("optimizer", "AdamW"))
    suffixes = _TENSORS.get(kind)
    if suffixes is None:
        raise ConversionError(f"the optimizer {kind} has no counterpart in the official code")
    numbered = [slot for group in grouped_parameters(parameters) for slot in group]
    state = {}
    for number, slot in enumerate(numbered):
        values = {there: entries.get(slot.name + here) for there, here in suffixes.items()}
        if any(value is None for value in values.values()):
            continue
        official = {there: slot.to_torch(np.asarray(value)) for there, value in values.items()}
        if kind == "AdamW":
            behind = origin.get("steps_behind", {}).get(slot.name)
            taken = _steps_taken(entries, slot, steps) if behind is None else steps - behind
            step = taken if origin.get("counts_in_int") else np.array(taken, np.float32)
            official = {"step": step, **official}
        state[number] = official
    sizes = [len(group) for group in grouped_parameters(parameters)]
    return {"state": state, "param_groups": _param_groups(kind, sizes, origin)}


def _steps_taken(entries: Mapping[str, Any], slot: Slot, steps: int) -> int:
    """Steps of one parameter: all of the run's, but for a last layer that was frozen at first."""
    power = float(np.asarray(entries[slot.name + _POWERS[1]]).item())
    if not 0 < power < 1:
        return steps
    counted = round(math.log(power) / math.log(_BETAS[1])) - 1
    # A float32 that was multiplied so often is sure to a thousandth only.
    return steps if abs(counted - steps) <= 1e-3 * steps else counted


def _param_groups(kind: str, sizes: Sequence[int], origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    defaults: dict[str, Any] = {
        "AdamW": {"lr": 0.0, "betas": _BETAS, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False},
        "Momentum": {"lr": 0.0, "momentum": 0.9, "dampening": 0, "weight_decay": 0.0, "nesterov": False},
        "LARS": {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "eta": 0.001},
    }[kind]
    known = origin.get("param_groups") or [defaults, defaults]
    groups, first = [], 0
    for size, group in zip(sizes, known):
        groups.append({**group, "params": list(range(first, first + size))})
        first += size
    return groups
