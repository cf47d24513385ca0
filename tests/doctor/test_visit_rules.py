"""Verdicts from the doctor's visits as they would be recorded; for runs that do, see tests/engine/test_diagnosis.py."""

from __future__ import annotations

import math
from typing import Any, Callable

import pytest

from passl.doctor.runs import Run
from passl.doctor.verdict import diagnose

OUT_DIMS = (64, 4096, 65536)


def visit(step: int, out_dim: int, **more: Any) -> dict[str, Any]:
    """Of a healthy run; entropies are given as shares of ln(out_dim)."""
    row = {
        "step": step, "out_dim": out_dim, "loss": 0.7, "loss_max": 0.8, "teacher_entropy": 0.4,
        "teacher_mean_entropy": 0.7, "student_teacher_kl": 1.0, "prototypes_in_use": 20, "center_norm": 1.0,
        "feature_std": 0.4, "update_ratio": 0.003, "weight_rms": 0.05, "lr": 1e-3, "lr_share": 1.0,
        "progress": step / 10000, "teacher_temp": 0.04, "student_temp": 0.1, "data_wait": 0.1,
        "distinct_samples": 1.0, "repeated_samples": 0.0, "distinct_images": 1.0, **more,
    }  # fmt: skip
    for key in ("loss", "loss_max", "teacher_entropy", "teacher_mean_entropy"):
        row[key] *= math.log(out_dim)
    return row


def verdict(out_dim: int, of: Callable[[int], dict[str, Any]], steps: int, interval: int = 25, first: int = 1) -> str:
    run = Run()
    for step in [first, *range(interval, steps + 1, interval)]:
        run.add(visit(step, out_dim, **of(step)))
    return diagnose(run).verdict


def plateau(step: int) -> dict[str, Any]:
    return {"loss": 1.0, "teacher_entropy": 0.9995, "teacher_mean_entropy": 0.9999}


CASES = {
    "centring off": (
        lambda step: {"center_norm": 0, "teacher_mean_entropy": 0.15, "teacher_entropy": 0.1},
        "one-hot collapse",
    ),
    "centring off, on the way": (  # as measured: 4,096 prototypes need 400 steps to become two
        lambda step: {"center_norm": 0, "teacher_mean_entropy": max(0.9 - step / 450, 0.15), "teacher_entropy": 0.1},
        "one-hot collapse",
    ),
    "centring off, nothing narrows": (lambda step: {"center_norm": 0}, "healthy"),
    "one-hot": (lambda step: {"teacher_mean_entropy": 0.02, "teacher_entropy": 0.01}, "one-hot collapse"),
    "uniform": (plateau, "uniform collapse"),
    "sharpening off": (lambda step: {**plateau(step), "teacher_temp": 0.2, "lr_share": 0.1}, "uniform collapse"),
    "not sharpening, loss at ln K": (
        lambda step: {"loss": 1.02, "teacher_entropy": 0.85, "teacher_mean_entropy": 0.95, "teacher_temp": 0.1},
        "uniform collapse",
    ),
    "learned, then fell": (lambda step: plateau(step) if step > 400 else {}, "uniform collapse"),
    "weights that leap": (
        lambda step: {"weight_rms": 0.05 if step < 50 else 0.3, "teacher_entropy": 0.6, "teacher_mean_entropy": 0.62},
        "unstable",
    ),
    "too fast": (
        lambda step: {"update_ratio": 0.05, "teacher_entropy": 0.6, "teacher_mean_entropy": 0.65},
        "unstable",
    ),
    "a leap, then ln K": (lambda step: {**plateau(step), "weight_rms": 0.05 if step < 50 else 0.3}, "unstable"),
    "loss beyond reason": (lambda step: {"loss_max": 4.0}, "unstable"),
    "still": (lambda step: {"update_ratio": 0.0}, "not learning"),
    "one image": (lambda step: {"distinct_images": 0.125}, "not learning"),
    "equal samples": (lambda step: {"distinct_samples": 0.1}, "not learning"),
    "one batch": (lambda step: {"repeated_samples": 1.0 if step > 1 else 0.0}, "not learning"),
    "one batch, and its collapse": (lambda step: {**plateau(step), "repeated_samples": 1.0}, "not learning"),
    "one answer": (lambda step: {"teacher_entropy": 0.5, "teacher_mean_entropy": 0.501}, "not learning"),
    "waiting": (lambda step: {"data_wait": 0.8}, "data-bound"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("out_dim", OUT_DIMS)
@pytest.mark.parametrize("case", CASES)
def test_forced(case, out_dim) -> None:
    of, expected = CASES[case]
    assert verdict(out_dim, of, 600) == expected


HEALTHY = {
    "plain": lambda step: {},
    "the plateau before the warm-up ends": lambda step: {
        **plateau(step), "lr_share": step / 12500, "progress": step / 125000,
    },
    "a short plateau": lambda step: plateau(step) if step < 150 else {},
    "leaving the plateau slowly": lambda step: {
        "loss": 1.0, "teacher_entropy": 0.998 - step * 1e-5, "teacher_mean_entropy": 0.9985,
    },
    "a dip of the entropy": lambda step: {"teacher_mean_entropy": 0.02, "teacher_entropy": 0.01} if step == 300 else {},
    "a late and slow one": lambda step: {"update_ratio": 0.003 if step < 400 else 1e-9},
    "weights that grow with time": lambda step: {"weight_rms": 0.02 * (1 + step / 300)},
    "a loss above ln K": lambda step: {"loss": 1.05, "loss_max": 1.3},
    "slow first steps": lambda step: {"data_wait": 0.9 if step < 30 else 0.2},
}  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("out_dim", OUT_DIMS)
@pytest.mark.parametrize("case", HEALTHY)
def test_healthy(case, out_dim) -> None:
    assert verdict(out_dim, HEALTHY[case], 600) == "healthy"


@pytest.mark.parametrize("interval", [10, 50, 100])
@pytest.mark.parametrize(
    "case",
    ["one-hot", "centring off, on the way", "uniform", "sharpening off", "weights that leap", "one image", "one batch"],
)
def test_within_a_few_hundred_steps_at_any_interval(case, interval) -> None:
    of, expected = CASES[case]
    assert verdict(4096, of, 400, interval) == expected


def test_the_first_steps_prove_nothing() -> None:
    assert verdict(4096, plateau, 100) == "healthy"
    assert "too early" in diagnose(Run(visits=[visit(1, 64)], out_dim=64)).evidence[-1]


def test_a_probe_has_no_entropies() -> None:
    """Its weights start near 0 and grow, its loss may rise and fall at the rates that are usual for it, and without
    drawn crops each epoch repeats the one before.
    """
    run = Run(has_labels=True)
    for step in range(1, 400, 20):
        row = {"step": step, "loss": 2.0, "weight_rms": 0.01 * step, "update_ratio": 0.1, "repeated_samples": 1.0}
        run.add({**row, "data_wait": 0.1})
    assert diagnose(run).verdict == "healthy"
    for step in range(400, 500, 20):
        run.add({"step": step, "loss": 15.8, "loss_max": 30.0, "weight_rms": 1.0, "update_ratio": 0.1})
    assert diagnose(run).verdict == "healthy"


def test_advice_names_present_values() -> None:
    settings = {
        "Model.name": "DINO",
        "Schedules.teacher_temp.base": 0.2,
        "Schedules.lr.base": 0.5,
        "Model.head.use_bn": True,
    }
    run = Run(settings=settings)
    for step in range(25, 401, 25):
        run.add(visit(step, 64, **plateau(step), teacher_temp=0.2))
    advice = "\n".join(diagnose(run).advice)
    assert "Schedules.teacher_temp.base (now 0.2): lower to 0.04" in advice
    assert "Schedules.lr.base (now 0.5)" in advice
    assert "Model.freeze_last_layer (now 1)" in advice, "a default is a value too"
    assert "use_bn" not in advice, "it is on already"


def test_a_long_run_is_remembered_in_few_rows() -> None:
    run = Run()
    for step in range(25, 100001, 25):
        run.add(visit(step, 64))
    assert len(run.visits) <= 400
    assert run.visits[0]["step"] == 25
    assert run.visits[-1]["step"] == 100000
    assert diagnose(run).verdict == "healthy"
