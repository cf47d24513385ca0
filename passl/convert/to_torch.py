"""passl's state in the form of the official files."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from passl.convert.conversion import Conversion
from passl.convert.kept_data import TORCH_KEY, of_states
from passl.convert.layout import COUNTER, Slot
from passl.convert.official_run import student_parameters
from passl.convert.optimizer_state import to_official

_NETWORKS = ("student.", "teacher.")


def state_dict(conversion: Conversion, prefix: str = "", counters: Optional[Mapping[str, int]] = None) -> OrderedDict:
    """What ``load_state_dict(strict=True)`` of the PyTorch model takes: the tensors below ``prefix``, without it.

    counters: steps that batch norms have counted, where they are known (else 0: nothing in PyTorch reads them).
    """
    known = {**conversion.counters, **(counters or {})}
    state: OrderedDict[str, np.ndarray] = OrderedDict()
    for slot in conversion.layout:
        if not slot.name.startswith(prefix):
            continue
        name = slot.torch_name[len(prefix) :]
        state[name] = slot.to_torch(conversion.state[slot.name])
        if name.endswith("running_var"):
            counter = slot.torch_name[: -len("running_var")] + COUNTER
            state[counter[len(prefix) :]] = np.array(known.get(counter, 0), np.int64)
    return state


def official_files(
    conversion: Conversion,
    optimizer: Optional[Mapping[str, Any]] = None,
    states: Optional[Mapping[str, Any]] = None,
    counters: Optional[Mapping[str, int]] = None,
) -> dict[str, Any]:
    """What to write: suffix of the name -> object for ``torch.load``. One file, but for a probe, which the official
    code keeps in two (``""`` the backbone, ``"_linearweights"`` the classifier).

    optimizer, states: of a run, the content of its ``.pdopt`` and ``.pdstates``.
    """
    if conversion.kind == "run":
        return {"": _full_checkpoint(conversion, optimizer, states or {}, counters)}
    if conversion.kind == "network":
        prefix = next((p for p in _NETWORKS if conversion.layout[0].name.startswith(p)), "")
        state = state_dict(conversion, prefix, counters)
        return {"": {prefix[:-1]: state} if prefix else state}
    if conversion.kind == "linear":
        return {"": _linear(conversion)}
    if conversion.kind == "probe":
        return {"": state_dict(conversion, "backbone.", counters), "_linearweights": _linear(conversion)}
    return {"": state_dict(conversion, counters=counters)}


def _linear(conversion: Conversion) -> dict[str, Any]:
    """As the official evaluation saves it: from within DistributedDataParallel."""
    state = state_dict(conversion, "linear.")
    return {"state_dict": OrderedDict((f"module.{name}", value) for name, value in state.items())}


def _full_checkpoint(
    conversion: Conversion,
    optimizer: Optional[Mapping[str, Any]],
    states: Mapping[str, Any],
    counters: Optional[Mapping[str, int]],
) -> dict[str, Any]:
    student, teacher = (state_dict(conversion, prefix, counters) for prefix in _NETWORKS)
    # The official code wraps the teacher only where there are batch norms to synchronise.
    has_batch_norms = any(name.endswith("running_var") for name in teacher)
    checkpoint: dict[str, Any] = {
        "student": OrderedDict((f"module.{name}", value) for name, value in student.items()),
        "teacher": OrderedDict((f"module.{name}" if has_batch_norms else name, v) for name, v in teacher.items()),
    }
    origin = states.get("origin") or {}
    if optimizer:
        trained = _trained_parameters(conversion, optimizer, origin)
        checkpoint["optimizer"] = to_official(optimizer, trained, int(states.get("step", 0)), origin)
    if "epoch" in states:
        checkpoint["epoch"] = int(states["epoch"])
    if origin.get("args"):
        checkpoint["args"] = argparse.Namespace(**origin["args"])
    checkpoint["dino_loss"] = OrderedDict(center=conversion.state["dino_loss.center"])
    if data := of_states(states):
        checkpoint[TORCH_KEY] = data
    if origin.get("fp16_scaler"):
        checkpoint["fp16_scaler"] = dict(origin["fp16_scaler"])
    return checkpoint


def _trained_parameters(conversion: Conversion, optimizer: Mapping[str, Any], origin: Mapping[str, Any]) -> list[Slot]:
    """The optimizer's parameters: the student's, without the gain of the last layer unless that is trained."""
    parameters = student_parameters(conversion)
    without_gain = [slot for slot in parameters if not slot.name.endswith("last_layer.weight_g")]
    if groups := origin.get("param_groups"):
        number = sum(len(group["params"]) for group in groups)
        return parameters if number == len(parameters) else without_gain
    is_trained = any(key.startswith("student.head.last_layer.weight_g") for key in optimizer)
    return parameters if is_trained else without_gain
