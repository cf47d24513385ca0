"""KoLeo against recorded values of the official code, and where that would give no number."""

from __future__ import annotations

import sys

import numpy as np
import paddle
import pytest

from passl.models.dinov2 import koleo_loss
from tests.models.weights import assert_close

module = sys.modules["passl.models.dinov2.koleo_loss"]  # the package has the function under the same name


def loss_and_gradient(features: np.ndarray, dtype: str) -> tuple[paddle.Tensor, np.ndarray]:
    kept = "float32" if dtype == "bfloat16" else dtype  # numpy has none
    x = paddle.to_tensor(features.astype(kept)).astype(dtype)
    x.stop_gradient = False
    loss = koleo_loss(x)
    loss.backward()
    return loss, x.grad.astype("float64").numpy()


@pytest.mark.smoke
def test_recorded_losses(reference) -> None:
    recorded = np.load(reference / "dinov2_losses.npz")
    cases = sorted({name.split("/")[1] for name in recorded.files if name.startswith("koleo/")})
    assert cases
    for case in cases:
        features = recorded[f"koleo/{case}/x"]
        loss, gradient = loss_and_gradient(features, "float64")
        assert_close(loss.item(), recorded[f"koleo/{case}/loss"], 1e-9, case)
        assert_close(gradient, recorded[f"koleo/{case}/grad"], 1e-9, case)
        nearest = module.nearest(module._unit(paddle.to_tensor(features)))
        np.testing.assert_array_equal(nearest.numpy(), recorded[f"koleo/{case}/nearest"])


ROWS = np.random.default_rng(0).standard_normal((6, 8))
HARD = {
    "pairs": np.repeat(ROWS[:3], 2, axis=0),
    "threes": np.repeat(ROWS[:2], 3, axis=0),
    "all equal": np.repeat(ROWS[:1], 7, axis=0),
    "opposite": np.stack([ROWS[0], -ROWS[0]]),
    "zeros": np.zeros((5, 8)),
    "one zero": np.concatenate([ROWS, np.zeros((1, 8))]),
    "axes": np.eye(6, 8),
    "one image": ROWS[:1],
    "one zero image": np.zeros((1, 8)),
    "one number": np.ones((4, 1)),
}
FACTORS = {
    "float16": (1.0, 2e4, 6e-8),
    "bfloat16": (1.0, 1e37, 1e-38),
    "float32": (1.0, 1e38, 1e19, 1e-20, 1e-38, 1e-45),
    "float64": (1.0, 1e300, 1e-300),
}


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("case", HARD)
def test_always_a_number(case, dtype) -> None:
    for factor in FACTORS[dtype]:
        loss, gradient = loss_and_gradient(HARD[case] * factor, dtype)
        assert loss.dtype == (paddle.float64 if dtype == "float64" else paddle.float32)
        assert np.isfinite(loss.item()), factor
        assert np.isfinite(gradient).all(), factor


def test_one_image_has_no_other() -> None:
    loss, gradient = loss_and_gradient(ROWS[:1], "float32")
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("factor", [1e-6, 1e17, 1e37])
def test_the_length_does_not_matter(factor) -> None:
    expected, gradient = loss_and_gradient(ROWS, "float32")
    loss, scaled = loss_and_gradient(ROWS * factor, "float32")
    assert_close(loss.item(), expected.item(), 1e-5)
    if factor < 1e30:  # else it is next to 0
        assert_close(scaled * factor, gradient, 1e-5)


def test_full_precision_under_autocast() -> None:
    expected, _ = loss_and_gradient(ROWS, "float32")
    with paddle.amp.auto_cast(level="O1"):
        loss, _ = loss_and_gradient(ROWS, "float32")
    assert loss.dtype == paddle.float32
    assert loss.item() == expected.item()


def test_a_part_of_the_pairs_at_a_time(monkeypatch) -> None:
    """The same result, and no matrix of all pairs."""
    features = np.random.default_rng(0).standard_normal((37, 5))
    features[20] = features[3]
    expected, gradient = loss_and_gradient(features, "float64")
    largest = []
    matmul = paddle.matmul

    def watched(*arguments, **options):
        product = matmul(*arguments, **options)
        largest.append(product.shape[0] * product.shape[1])
        return product

    monkeypatch.setattr(paddle, "matmul", watched)
    for limit in (1, 37, 100, 37 * 36):
        largest.clear()
        monkeypatch.setattr(module, "_MAX_SIMILARITIES", limit)
        loss, same = loss_and_gradient(features, "float64")
        assert max(largest) <= max(limit, 37)
        assert_close(loss.item(), expected.item(), 1e-12)
        assert_close(same, gradient, 1e-12)
