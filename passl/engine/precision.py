"""Mixed precision: where it is cast, how the loss is scaled, and a refusal where the device would silently ignore
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import paddle
from paddle import nn

from passl.engine.optim import Optimizer

LEVELS = ("O0", "O1", "O2")
DTYPES = ("float16", "bfloat16")


@dataclass
class GradScalerSettings:
    """Arguments of ``paddle.amp.GradScaler``, under Paddle's own names and with its own defaults."""

    enable: bool = True
    init_loss_scaling: float = 65536.0
    incr_ratio: float = 2.0
    decr_ratio: float = 0.5
    incr_every_n_steps: int = 2000
    decr_every_n_nan_or_inf: int = 1
    use_dynamic_loss_scaling: bool = True


_MASTER = "_fp32_master_0"


def in_full_precision(
    weights: Mapping[str, Any], optimizer_state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer state of a run at level O2 as those of one in float32: the master weights are the weights.

    What holds no master weights comes back as it is.
    """
    state = {key: value for key, value in optimizer_state.items() if key != "master_weights"}
    masters = dict(optimizer_state.get("master_weights", {}))
    masters.update((key[: -len(_MASTER)], state.pop(key)) for key in list(state) if key.endswith(_MASTER))
    renamed = {key.replace(_MASTER, "") if _MASTER in key else key: value for key, value in state.items()}
    return {**weights, **masters}, renamed


class Precision:
    """The arithmetic of a run.

    Args:
        level: O0 float32; O1 cast per operation; O2 half-precision weights with float32 master weights.
        dtype: float16 (with loss scaling) or bfloat16 (without).

    Raises:
        ValueError: an unknown level or dtype, or O1/O2 on a CPU, where Paddle computes in float32 without saying so.
    """

    def __init__(
        self, level: str = "O0", dtype: str = "float16", grad_scaler: Optional[GradScalerSettings] = None
    ) -> None:
        if level not in LEVELS:
            raise ValueError(f"FP16.level ({level!r}) must be one of {', '.join(LEVELS)}")
        if dtype not in DTYPES:
            raise ValueError(f"FP16.dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
        if level != "O0" and not paddle.get_device().startswith("gpu"):
            raise ValueError(
                f"FP16.level={level} needs a GPU: on {paddle.get_device()} Paddle would compute in float32 without "
                "saying so. Use -o FP16.level=O0"
            )
        self.level = level
        self.dtype = dtype
        self.scaler: Optional[paddle.amp.GradScaler] = None
        if level != "O0" and dtype == "float16":
            self.scaler = paddle.amp.GradScaler(**asdict(grad_scaler or GradScalerSettings()))

    def prepare(self, layers: Sequence[nn.Layer]) -> None:
        """Under O2 cast the weights of ``layers`` (the optimizers keep float32 masters); nothing to do otherwise."""
        if self.level == "O2":
            for layer in layers:
                paddle.amp.decorate(models=layer, level="O2", dtype=self.dtype)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.level == "O0":
            return contextlib.nullcontext()
        return paddle.amp.auto_cast(level=self.level, dtype=self.dtype)

    def backward(self, loss: paddle.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Gradients back to their true size, before they are clipped."""
        if self.scaler:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Optimizer step, left out where the scaler found a gradient that is not finite."""
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with, 1 without a scaler."""
        return float(self.scaler.state_dict()["scale"].item()) if self.scaler and self.scaler.is_enable() else 1.0

    def overflow_is_normal(self) -> bool:
        """Whether a gradient that is not finite says no more than that the loss scale is too high, and must come
        down.
        """
        return self.loss_scale > 1 and self.scaler.is_use_dynamic_loss_scaling()

    def lower(self) -> Optional[dict[str, str]]:
        """Level and dtype in which less overflows: bfloat16 at the same level, then float32, then None."""
        if self.level == "O0":
            return None
        if self.dtype == "float16" and paddle.amp.is_bfloat16_supported():
            return {"level": self.level, "dtype": "bfloat16"}
        return {"level": "O0", "dtype": "float16"}

    def __str__(self) -> str:
        return "float32 (FP16.level O0)" if self.level == "O0" else f"{self.dtype} (FP16.level {self.level})"

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # A disabled scaler saves {}, and an enabled one refuses it.
        if self.scaler and state:
            self.scaler.load_state_dict(dict(state))
