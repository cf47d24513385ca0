"""Groups of parameters with their own share of the scheduled values."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl.engine.optim import LARS, AdamW, Momentum

START = np.array([[1.0, -2.0], [0.5, 4.0]])
GRADIENTS = (np.array([[0.5, 1.0], [-2.0, 0.25]]), np.array([[-1.0, 0.5], [0.5, 2.0]]))
RATES, DECAYS = (0.5, 0.25), (0.1, 0.2)
FACTORS = {"full": None, "tenth": 0.1, "none": 0.0}  # of the learning rate; None: the group does not say


def groups():
    found = []
    for name, factor in FACTORS.items():
        parameter = paddle.create_parameter([2, 2], "float64")
        parameter.set_value(START)
        parameter.name = name
        found.append({"params": [parameter], "weight_decay": 1.0})
        if factor is not None:
            found[-1]["learning_rate"] = factor
    return found


def adamw(rates):
    weight, first, second = START, 0.0, 0.0
    for step, (gradient, rate, decay) in enumerate(zip(GRADIENTS, rates, DECAYS), start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight * (1 - rate * decay)
        weight = weight - rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return weight


def momentum(rates, adapt=lambda weight, direction: 1.0):
    weight, velocity = START, 0.0
    for gradient, rate, decay in zip(GRADIENTS, rates, DECAYS):
        direction = gradient + decay * weight
        velocity = 0.9 * velocity + direction * adapt(weight, direction)
        weight = weight - rate * velocity
    return weight


def lars(rates):
    return momentum(rates, lambda weight, direction: 0.001 * np.linalg.norm(weight) / np.linalg.norm(direction))


@pytest.mark.smoke
@pytest.mark.parametrize(("kind", "expected"), [(AdamW, adamw), (Momentum, momentum), (LARS, lars)])
def test_a_group_takes_its_share_of_the_learning_rate(kind, expected, float64):
    parts = groups()
    optimizer = kind(parts)
    for gradient, rate, decay in zip(GRADIENTS, RATES, DECAYS):
        optimizer.set(rate, decay)
        sum((p * paddle.to_tensor(gradient)).sum() for p in optimizer.parameters).backward()
        optimizer.step()
        optimizer.clear_grad()
    for part, factor in zip(parts, FACTORS.values()):
        rates = [rate * (1.0 if factor is None else factor) for rate in RATES]
        np.testing.assert_allclose(part["params"][0].numpy(), expected(rates), rtol=0, atol=1e-7)
    plain = kind([{**part, "learning_rate": 1.0} for part in groups()])
    for parameter in plain.parameters:
        (parameter * 2.0).sum().backward()
    plain.step()
    assert plain.state_dict().keys() == optimizer.state_dict().keys()
    assert not any("learning_rate" in key for key in optimizer.state_dict())


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_a_share_that_is_none(factor):
    part = {**groups()[0], "learning_rate": factor}
    with pytest.raises(ValueError, match=rf"learning_rate of a group \({factor}\) must be a factor of at least 0"):
        Momentum([part])
