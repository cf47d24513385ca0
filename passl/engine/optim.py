"""Optimizers with the parameter groups, clipping and decay of the official DINO.

Weights are changed by Paddle's own optimizer where it agrees with the official numbers (AdamW), and by a few lines
where
it does not (Momentum, LARS). All are driven from outside: :meth:`Optimizer.set` gives the learning rate and the weight
decay of the step that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Optional

import numpy as np
import paddle

from passl.checkpoint import CheckpointError
from passl.registry import OPTIMIZERS

# {"params": list of parameters, "weight_decay": factor on the scheduled decay (1.0 or 0.0), "learning_rate": factor on
# the scheduled rate (1.0 if not given)}
ParamGroup = dict
CLIP_MODES = ("each", "global")
HALF_PRECISION = (paddle.float16, paddle.bfloat16)
_VELOCITY, _MASTER = "_velocity_0", "_fp32_master_0"
_MOMENTS, _POWERS = ("_moment1_0", "_moment2_0"), ("_beta1_pow_acc_0", "_beta2_pow_acc_0")
WRITER = "optimizer"  # the entry of a state that says whose it is; older files have none
MASTERS = "master_weights"
_WRITERS = {**dict.fromkeys((*_MOMENTS, *_POWERS), "AdamW"), _VELOCITY: "Momentum or LARS"}


class Optimizer:
    """What the trainer drives: clip, set, step, clear, save. One implementation per rule of update.

    Args:
        groups: parameter groups of the method, see :class:`passl.models.method.Method`.
        weight_decay: used where no ``weight_decay`` schedule is configured.
        clip_norm: largest norm of a gradient, None for no clipping.
        clip_mode: "each": every parameter by itself (official DINO); "global": all gradients as one vector.
    """

    is_shared = False  # True: step and state_dict must be called by all processes

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        weight_decay: float = 0.0,
        clip_norm: Optional[float] = None,
        clip_mode: str = "each",
    ) -> None:
        if clip_mode not in CLIP_MODES:
            raise ValueError(f"clip_mode ({clip_mode!r}) must be one of {', '.join(CLIP_MODES)}")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm ({clip_norm}) must be positive; null turns clipping off")
        self.groups = [{"learning_rate": 1.0, **group} for group in groups if group["params"]]
        self._param_groups = self.groups  # GradScaler reads it
        for group in self.groups:
            if not 0 <= group["learning_rate"] < float("inf"):
                raise ValueError(f"learning_rate of a group ({group['learning_rate']}) must be a factor of at least 0")
        self.parameters = [p for group in self.groups for p in group["params"]]
        if not self.parameters:
            raise ValueError("the method has no trainable parameter")
        self.clip_norm = clip_norm
        self.clip_mode = clip_mode
        self.learning_rate = 0.0
        self.weight_decay = weight_decay

    @property
    def kind(self) -> str:
        """What a state is said to be of."""
        return type(self).__name__

    def set(self, learning_rate: float, weight_decay: Optional[float] = None) -> None:
        """Values for the next step; both act on each group times the group's own factors."""
        self.learning_rate = learning_rate
        if weight_decay is not None:
            self.weight_decay = weight_decay

    @paddle.no_grad()
    def clip_gradients(self) -> list[Optional[paddle.Tensor]]:
        """Scale gradients down to ``clip_norm``; returns the norm of each parameter's gradient before (None: no
        gradient).

        The factor is ``clip_norm / (norm + 1e-6)`` where that is below one, as in the official code.
        """
        norms = [None if p.grad is None else _norm(p.grad) for p in self.parameters]
        present = [norm for norm in norms if norm is not None]
        if self.clip_norm is None or not present:
            return norms
        if self.clip_mode == "global":
            total = _norm(paddle.stack(present))
            self._scale([total] * len(norms))
        else:
            self._scale(norms)
        return norms

    def _scale(self, norms: Sequence[Optional[paddle.Tensor]]) -> None:
        on_cpu = self.parameters[0].place.is_cpu_place()
        for parameter, norm in zip(self.parameters, norms):
            if parameter.grad is None or norm is None:
                continue
            factor = self.clip_norm / (norm + 1e-6)
            # Reading a number costs nothing on a CPU and saves a pass over the gradient; on a GPU it would stall the
            # queue.
            if not on_cpu:
                parameter.grad.multiply_(factor.clip(max=1.0).astype(parameter.grad.dtype))
            elif factor.item() < 1:
                parameter.grad.scale_(factor.item())

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        raise NotImplementedError

    def clear_grad(self) -> None:
        """Forget all gradients (None, not zero: a dropped gradient must not advance any moment)."""
        for parameter in self.parameters:
            parameter.clear_gradient(False)

    def state_dict(self) -> dict[str, Any]:
        """Moments and counters, keyed by parameter name + what they are; nothing of parameters that never stepped."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """The opposite of :meth:`state_dict`.

        Raises:
            CheckpointError: another optimizer saved the state; an entry belongs to no parameter or has another shape; a
                parameter has some of its entries, but not all. Nothing is changed.
        """
        raise NotImplementedError

    def _layouts(self, name: str) -> tuple[set[str], set[str]]:
        """Keys of all entries of the parameter ``name`` in full and in half precision, masters as entries."""
        raise NotImplementedError

    def _checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` without the name of its optimizer, once it is sure that it fits: Paddle would skip silently what
        it does not know, and start anew what is not there.

        A parameter has all of its entries, or none: the last layer of a head may not have stepped yet.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(f"the optimizer state is no mapping of names, but {type(state).__name__}")
        entries = dict(state)
        writer = str(entries.pop(WRITER, ""))
        flat = {key: value for key, value in entries.items() if key != MASTERS}
        masters = entries.get(MASTERS, {})
        if not isinstance(masters, Mapping):
            raise CheckpointError(f"{MASTERS} of the optimizer state is no mapping, but {type(masters).__name__}")
        flat.update((f"{name}{_MASTER}", value) for name, value in masters.items())
        if not writer:
            writer = self._guess_writer(flat)
        if writer != self.kind:
            raise CheckpointError(
                f"the optimizer state was saved by {writer}, this is {self.kind}: use the same Optimizer, or "
                "start anew with -o Global.checkpoint=null and that checkpoint as Global.pretrained_model"
            )
        known: set[str] = set()
        missing: set[str] = set()
        misshapen = []
        for parameter in self.parameters:
            full, half = self._layouts(parameter.name)
            present = (full | half) & flat.keys()
            expected = half if any(_MASTER in key for key in present) else full
            known |= expected
            missing |= expected - present if present else set()
            misshapen += [key for key in sorted(present) if not _fits(flat[key], key, parameter)]
        for problem, keys in (
            ("has entries of no trainable parameter of this model", flat.keys() - known),
            ("lacks some entries of parameters of which it has others", missing),
            ("has entries that are no numbers in the shape of their parameter", misshapen),
        ):
            if keys:
                raise CheckpointError(f"the optimizer state {problem}: {_first(keys)}")
        return entries

    def _guess_writer(self, flat: Mapping[str, Any]) -> str:
        """Who saved a state that does not say so, by its first entry that belongs to one kind of optimizer only."""
        own, suffixes = self._layouts("")[0], {s for key in flat for s in _WRITERS if str(key).endswith(s)}
        if not suffixes:
            raise CheckpointError("the optimizer state holds no entry of any optimizer")
        foreign = sorted(suffixes - own)
        return _WRITERS[foreign[0]] if foreign else self.kind


@OPTIMIZERS.register("AdamW")
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): Paddle's own, kept in step with the schedules."""

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.04,
        clip_norm: Optional[float] = None,
        clip_mode: Literal["each", "global"] = "each",
    ) -> None:
        super().__init__(groups, weight_decay, clip_norm, clip_mode)
        self._betas = (beta1, beta2)
        self._fresh: set[str] = set()  # keys of what _fresh_moments made
        self._inner = paddle.optimizer.AdamW(
            learning_rate=0.0,
            parameters=[{**group, "weight_decay": group["weight_decay"] * weight_decay} for group in self.groups],
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            multi_precision=True,
        )

    def set(self, learning_rate: float, weight_decay: Optional[float] = None) -> None:
        super().set(learning_rate, weight_decay)
        self._inner.set_lr(float(learning_rate))
        # Paddle has no public way to change a group's decay after construction.
        for inner_group, group in zip(self._inner._param_groups, self.groups):
            inner_group["weight_decay"] = self.weight_decay * group["weight_decay"]

    def step(self) -> None:
        # Moments are named when they are made: always with _0, whatever else this process has built.
        with paddle.utils.unique_name.guard():
            self._inner.step()

    def state_dict(self) -> dict[str, Any]:
        state = self._inner.state_dict()
        state.pop("LR_Scheduler", None)
        if not self._inner._accumulators:  # no step since loading: Paddle gives back what it was given
            state = {key: value for key, value in state.items() if key not in self._fresh}
        # Paddle leaves out what it was given for parameters that have not stepped since.
        held = {k: value for k, value in self._inner._accumulators_holder.items() if k not in self._fresh}
        return {WRITER: self.kind, **held, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        entries = self._checked(state)
        fresh = self._fresh_moments(entries)
        self._fresh = set(fresh)
        self._inner.set_state_dict({**fresh, **_tensors(entries)})

    def _layouts(self, name: str) -> tuple[set[str], set[str]]:
        master = f"{name}{_MASTER}"
        suffixes = (*_MOMENTS, *_POWERS)
        return {f"{name}{s}" for s in suffixes}, {master, *(f"{master}{s}" for s in suffixes)}

    def _fresh_moments(self, state: Mapping[str, Any]) -> dict[str, paddle.Tensor]:
        """Entries of parameters that never took a step (a frozen last layer): Paddle refuses a state without them."""
        fresh = {}
        for parameter in self.parameters:
            full, half = self._layouts(parameter.name)
            if (full | half) & state.keys():
                continue
            is_half = parameter.dtype in HALF_PRECISION
            dtype = "float32" if is_half else parameter.dtype
            # Weights are cast to half precision after the state is loaded: its masters tell that they will be.
            names = [f"{parameter.name}{_MASTER}"] if is_half or MASTERS in state else []
            for name in names if is_half else [parameter.name, *names]:
                fresh.update((f"{name}{moment}", paddle.zeros(parameter.shape, dtype)) for moment in _MOMENTS)
                fresh.update((f"{name}{p}", paddle.full([1], b, dtype)) for p, b in zip(_POWERS, self._betas))
        return fresh


@OPTIMIZERS.register("Momentum", "SGD")
class Momentum(Optimizer):
    """Stochastic gradient descent with momentum; decay is added to the gradient, as PyTorch's SGD does.

    Paddle's own holds its momentum in float32, which costs a float64 run eight digits, and takes no scheduled decay.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        use_nesterov: bool = False,
        clip_norm: Optional[float] = None,
        clip_mode: Literal["each", "global"] = "each",
    ) -> None:
        super().__init__(groups, weight_decay, clip_norm, clip_mode)
        self.momentum = momentum
        self.use_nesterov = use_nesterov
        self._velocities: dict[str, paddle.Tensor] = {}
        self._masters: dict[str, paddle.Tensor] = {}

    @paddle.no_grad()
    def step(self) -> None:
        for group in self.groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["weight_decay"], self.learning_rate * group["learning_rate"])

    def _update(self, parameter: paddle.Tensor, decay_factor: float, learning_rate: float) -> None:
        weight = self._master(parameter)
        # A copy: clear_grad frees the memory of the gradient.
        direction = paddle.assign(parameter.grad).astype(weight.dtype)
        direction = self._direction(weight, direction, decay_factor)
        velocity = self._velocities.get(parameter.name)
        velocity = direction if velocity is None else velocity * self.momentum + direction
        self._velocities[parameter.name] = velocity
        move = direction + velocity * self.momentum if self.use_nesterov else velocity
        weight.subtract_(move * learning_rate)
        if weight is not parameter:
            parameter.copy_(weight.astype(parameter.dtype), True)

    def _direction(self, weight: paddle.Tensor, gradient: paddle.Tensor, decay_factor: float) -> paddle.Tensor:
        decay = self.weight_decay * decay_factor
        return gradient + weight * decay if decay else gradient

    def _master(self, parameter: paddle.Tensor) -> paddle.Tensor:
        """What is updated: the parameter, or the float32 copy of a half-precision one."""
        if parameter.dtype not in HALF_PRECISION:
            return parameter
        if parameter.name not in self._masters:
            self._masters[parameter.name] = parameter.astype("float32")
        return self._masters[parameter.name]

    def state_dict(self) -> dict[str, Any]:
        state = {f"{name}{_VELOCITY}": velocity for name, velocity in self._velocities.items()}
        masters = {f"{name}{_MASTER}": master for name, master in self._masters.items()}
        return {WRITER: self.kind, **state, **masters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        entries = self._checked(state)
        for suffix, table in ((_VELOCITY, self._velocities), (_MASTER, self._masters)):
            table.clear()
            table.update(
                (key[: -len(suffix)], paddle.to_tensor(value)) for key, value in entries.items() if key.endswith(suffix)
            )

    def _layouts(self, name: str) -> tuple[set[str], set[str]]:
        full = {f"{name}{_VELOCITY}"}
        return full, {*full, f"{name}{_MASTER}"}


@OPTIMIZERS.register("LARS")
class LARS(Momentum):
    """Momentum with layer-wise adaptive rates (You et al. 2017), by the official DINO's rule.

    In groups with decay, ``decay * weight`` is added to the gradient and the sum scaled by ``trust_coefficient *
    |weight| / |sum|`` (by 1 where either is 0); the others take plain momentum steps. Paddle's own LARS differs by
    6e-5.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float = 0.0,
        clip_norm: Optional[float] = None,
        clip_mode: Literal["each", "global"] = "each",
    ) -> None:
        super().__init__(groups, momentum, weight_decay, clip_norm=clip_norm, clip_mode=clip_mode)
        self.trust_coefficient = trust_coefficient

    def _direction(self, weight: paddle.Tensor, gradient: paddle.Tensor, decay_factor: float) -> paddle.Tensor:
        if not decay_factor:
            return gradient
        direction = super()._direction(weight, gradient, decay_factor)
        weight_norm, norm = _norm(weight), _norm(direction)
        one = paddle.ones_like(norm)
        adapted = (weight_norm > 0) & (norm > 0)
        ratio = self.trust_coefficient * weight_norm / paddle.where(adapted, norm, one)
        return direction * paddle.where(adapted, ratio, one)


def _norm(tensor: paddle.Tensor) -> paddle.Tensor:
    """Euclidean norm of all elements, in float32 at least."""
    flat = tensor.reshape([-1])
    if flat.dtype in HALF_PRECISION:
        flat = flat.astype("float32")
    # As a product of matrices this is six times faster on a CPU than paddle.dot.
    return paddle.matmul(flat.unsqueeze(0), flat.unsqueeze(1)).reshape([]).sqrt()


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {key: paddle.to_tensor(value) for key, value in state.items() if key != MASTERS}
    masters = {name: paddle.to_tensor(value) for name, value in state.get(MASTERS, {}).items()}
    for name, master in masters.items():
        master.name = f"{name}{_MASTER}"  # Paddle keys the moments by it
    return {**tensors, MASTERS: masters} if masters else tensors


def _fits(value: Any, key: str, parameter: paddle.Tensor) -> bool:
    """Whether an entry is a number (powers of beta) or has the parameter's shape."""
    array = np.asarray(value)
    if array.dtype.kind != "f":
        return False
    return array.size == 1 if key.endswith(_POWERS) else list(array.shape) == list(parameter.shape)


def _first(keys: Iterable[Any], limit: int = 20) -> str:
    names = sorted(map(str, keys))
    more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"
