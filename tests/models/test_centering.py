"""Sinkhorn-Knopp against the official code, on extreme logits, and on two processes."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl.models.centering import sinkhorn_knopp
from tests.engine import sinkhorn_job
from tests.engine.test_distributed import launch
from tests.models.weights import assert_close


def by_logarithms(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """The definition, in float64."""
    scores = logits.astype(np.float64) / temperature
    for _ in range(iterations):
        for axis in (0, 1):
            scores = scores - np.logaddexp.reduce(scores, axis, keepdims=True)
    return np.exp(scores)


@pytest.mark.smoke
def test_recorded_assignments(reference) -> None:
    recorded = np.load(reference / "dinov2_losses.npz")
    cases = sorted({name.split("/")[1] for name in recorded.files if name.startswith("sinkhorn/")})
    assert cases
    for case in cases:
        temperature, iterations = recorded[f"sinkhorn/{case}/temp_iters"].tolist()
        logits = paddle.to_tensor(recorded[f"sinkhorn/{case}/teacher"])
        found = sinkhorn_knopp(logits, temperature, int(iterations))
        assert_close(found, recorded[f"sinkhorn/{case}/out"], 1e-6, case)


@pytest.mark.parametrize("factor", [0.1, 3.0, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_of_any_width(factor, dtype) -> None:
    """From where exponentials suffice to where logarithms are needed, and on both sides of the border."""
    logits = (factor * np.random.default_rng(0).standard_normal((7, 13))).astype(dtype)
    # In float32 the largest of these logits, divided by the temperature, are known to 0.06 only.
    scaled = (paddle.to_tensor(logits) / 0.1).numpy()
    found = sinkhorn_knopp(paddle.to_tensor(logits), 0.1)
    assert found.dtype == getattr(paddle, dtype)
    assert_close(found, by_logarithms(scaled, 1.0), 1e-6 if dtype == "float32" else 1e-10)


LARGEST = 65504.0  # of float16
EXTREME = {
    "both ends": np.where(np.random.default_rng(1).random((6, 10)) < 0.5, LARGEST, -LARGEST),
    "all largest": np.full((6, 10), LARGEST),
    "all least": np.full((6, 10), -LARGEST),
    "a prototype that no row comes near": np.where(np.arange(10) == 3, -LARGEST, np.zeros((6, 10))),
    "a prototype of all rows": np.where(np.arange(10) == 3, LARGEST, -np.ones((6, 10))),
    "a row that comes near none": np.where(np.arange(6)[:, None] == 3, -LARGEST, np.zeros((6, 10))),
    "one row": np.linspace(-LARGEST, LARGEST, 10)[None],
    "one prototype": np.linspace(-LARGEST, LARGEST, 6)[:, None],
}


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_extreme_logits(case, dtype) -> None:
    logits = paddle.to_tensor(EXTREME[case].astype(dtype))
    for temperature in (0.01, 0.04, 1.0):
        found = sinkhorn_knopp(logits, temperature).numpy().astype(np.float64)
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        assert_close(found.sum(1), np.ones(len(found)), 1e-5, "rows")
        assert_close(found, by_logarithms(EXTREME[case], temperature), 1e-5)


def test_many_iterations_spread_rows_evenly() -> None:
    logits = paddle.to_tensor(np.random.default_rng(0).standard_normal((20, 5)))
    found = sinkhorn_knopp(logits, 0.3, iterations=200)
    assert_close(found.sum(0), np.full(5, 4.0), 1e-6)
    assert_close(found.sum(1), np.ones(20), 1e-12)
    with pytest.raises(ValueError, match=r"iterations \(0\) must be at least 1"):
        sinkhorn_knopp(logits, 0.3, iterations=0)


def test_two_processes_are_one_with_all_rows(tmp_path) -> None:
    """Also with unequal numbers of rows; each row of a centre counts the same."""
    done = launch(tmp_path, sinkhorn_job.__file__, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for name, (*shares, factor) in sinkhorn_job.CASES.items():
        logits = sinkhorn_job.logits(factor)
        whole = sinkhorn_knopp(paddle.to_tensor(logits), sinkhorn_job.TEMPERATURE).numpy()
        for share, result in zip(shares, results):
            assert result[name].shape == whole[share].shape
            if share:
                assert_close(result[name], whole[share], 1e-6, name)
            center = sinkhorn_job.center_after(logits)
            assert_close(result[f"{name}/center"], center, 1e-6 * factor, name)
