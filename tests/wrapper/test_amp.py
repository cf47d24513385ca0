"""Mixed precision, as far as a CPU shows it."""

from __future__ import annotations

import warnings

import numpy as np
import paddle
import pytest

from tests.wrapper.small import batch, small_wrapper

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.smoke
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_loop_with_autocast_and_scaler(level):
    wrapper = small_wrapper()
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=wrapper.parameters())
    if level == "O2":
        _, optimizer = paddle.amp.decorate(wrapper.half_precision_layers(), optimizer, level="O2")
    scaler = paddle.amp.GradScaler(init_loss_scaling=128.0)
    for step in range(2):
        with paddle.amp.auto_cast(level=level):
            output, loss = wrapper(batch())
        assert loss.dtype == paddle.float32
        scaler.scale(loss + output.astype("float32").mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad()
        wrapper.ema_update(step)
        assert np.isfinite(loss.item())


def test_decorating_the_whole_wrapper_leaves_teacher_and_heads_in_full_precision():
    """Nothing is cast on a CPU: this looks at the switch by which Paddle decides."""
    wrapper = small_wrapper()
    kept = (wrapper.method.teacher, wrapper.method.student.head, wrapper.method.dino_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paddle.amp.decorate(wrapper, level="O2")
    for layer in kept:
        for one in layer.sublayers(include_self=True):
            assert not getattr(one, "_cast_to_low_precision", True) or not getattr(one, "_cast_to_low_precison", True)
