"""Optimizers with the parameter groups, clipping and decay of the official DINO.

Weights are changed by Paddle's own optimizer where it agrees with the official numbers (AdamW), and by a few lines
where
it does not (Momentum, LARS). All are driven from outside: :meth:`Optimizer.set` gives the learning rate and the weight
decay of the step that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional

import numpy as np
import paddle

from passl.checkpoint import CheckpointError
from passl.registry import OPTIMIZERS

ParamGroup = dict  # {"params": list of parameters, "weight_decay": factor on the scheduled decay (1.0 or 0.0)}
CLIP_MODES = ("each", "global")
HALF_PRECISION = (paddle.float16, paddle.bfloat16)
_VELOCITY, _MASTER = "_velocity_0", "_fp32_master_0"


class Optimizer:
    """What the trainer drives: clip, set, step, clear, save. One implementation per rule of update.

    Args:
        groups: parameter groups of the method, see :class:`passl.models.method.Method`.
        weight_decay: used where no ``weight_decay`` schedule is configured.
        clip_norm: largest norm of a gradient, None for no clipping.
        clip_mode: "each": every parameter by itself (official DINO); "global": all gradients as one vector.
    """

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
        self.groups = self._param_groups = [group for group in groups if group["params"]]  # GradScaler reads the latter
        self.parameters = [p for group in self.groups for p in group["params"]]
        if not self.parameters:
            raise ValueError("the method has no trainable parameter")
        self.clip_norm = clip_norm
        self.clip_mode = clip_mode
        self.learning_rate = 0.0
        self.weight_decay = weight_decay

    def set(self, learning_rate: float, weight_decay: Optional[float] = None) -> None:
        """Values for the next step; the decay acts on each group times the group's own factor."""
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
        """Moments and counters, keyed by parameter name + what they are."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """The opposite of :meth:`state_dict`.

        Raises:
            CheckpointError: an entry belongs to no parameter of this optimizer, or has another shape.
        """
        raise NotImplementedError


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
        self._inner = paddle.optimizer.AdamW(
            learning_rate=0.0,
            parameters=[{"params": g["params"], "weight_decay": g["weight_decay"] * weight_decay} for g in self.groups],
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
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_state(state, self.parameters)
        self._inner.set_state_dict({**self._fresh_moments(state), **_tensors(state)})

    def _fresh_moments(self, state: Mapping[str, Any]) -> dict[str, paddle.Tensor]:
        """Entries of parameters that never took a step (a frozen last layer): Paddle refuses a state without them."""
        fresh = {}
        for parameter in self.parameters:
            if any(key.startswith(f"{parameter.name}_") and key.endswith("moment1_0") for key in state):
                continue
            is_half = parameter.dtype in HALF_PRECISION
            name = f"{parameter.name}{_MASTER}" if is_half else parameter.name
            dtype = "float32" if is_half else parameter.dtype
            for moment in ("moment1", "moment2"):
                fresh[f"{name}_{moment}_0"] = paddle.zeros(parameter.shape, dtype)
            for number, beta in enumerate(self._betas, 1):
                fresh[f"{name}_beta{number}_pow_acc_0"] = paddle.full([1], beta, dtype)
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
                    self._update(parameter, group["weight_decay"])

    def _update(self, parameter: paddle.Tensor, decay_factor: float) -> None:
        weight = self._master(parameter)
        # A copy: clear_grad frees the memory of the gradient.
        direction = paddle.assign(parameter.grad).astype(weight.dtype)
        direction = self._direction(weight, direction, decay_factor)
        velocity = self._velocities.get(parameter.name)
        velocity = direction if velocity is None else velocity * self.momentum + direction
        self._velocities[parameter.name] = velocity
        move = direction + velocity * self.momentum if self.use_nesterov else velocity
        weight.subtract_(move * self.learning_rate)
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
        return {**state, **{f"{name}{_MASTER}": master for name, master in self._masters.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_state(state, self.parameters)
        for suffix, table in ((_VELOCITY, self._velocities), (_MASTER, self._masters)):
            table.clear()
            table.update(
                (key[: -len(suffix)], paddle.to_tensor(value)) for key, value in state.items() if key.endswith(suffix)
            )


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
    tensors = {key: paddle.to_tensor(value) for key, value in state.items() if key != "master_weights"}
    masters = {name: paddle.to_tensor(value) for name, value in state.get("master_weights", {}).items()}
    for name, master in masters.items():
        master.name = f"{name}{_MASTER}"  # Paddle keys the moments by it
    return {**tensors, "master_weights": masters} if masters else tensors


def _check_state(state: Mapping[str, np.ndarray], parameters: Sequence[paddle.Tensor]) -> None:
    """Each entry must be named after a parameter and have its shape (or be a counter): Paddle would skip the rest
    silently.
    """
    by_length = sorted(parameters, key=lambda p: -len(p.name))
    for key, value in state.items():
        if key == "master_weights":
            continue
        owner = next((p for p in by_length if key.startswith(p.name + "_")), None)
        if owner is None:
            raise CheckpointError(
                f"the optimizer state has {key}, which belongs to no trainable parameter of this model"
            )
        if value.size > 1 and list(value.shape) != list(owner.shape):
            raise CheckpointError(
                f"the optimizer state {key} has shape {list(value.shape)}, its parameter {list(owner.shape)}"
            )
