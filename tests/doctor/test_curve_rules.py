"""Verdicts from the loss alone, as the official code's log.txt gives it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from passl.doctor.finding import Finding
from passl.doctor.reading import read_run
from passl.doctor.runs import Run
from passl.doctor.verdict import diagnose


def found(path: Path, losses: list[float], out_dim: Optional[int] = None, **more: list[float]) -> Finding:
    rows = [
        {
            "train_loss": loss,
            "train_lr": 1e-4,
            "train_wd": 0.04,
            "epoch": epoch,
            **{k: v[epoch] for k, v in more.items()},
        }
        for epoch, loss in enumerate(losses)
    ]
    file = path / "log.txt"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return diagnose(read_run(file, out_dim))


def noise(count: int, size: float) -> np.ndarray:
    return size * np.random.default_rng(0).standard_normal(count)


@pytest.mark.smoke
@pytest.mark.parametrize("out_dim", [4096, 65536, 1024, 8192, 60000])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    "start",
    [[], [9.3, 8.7, 8.5], [7.1, 6.9, 7.7], [6.5 - 0.02 * i for i in range(30)]],
    ids=["at once", "down", "up", "late"],
)
def test_a_plateau_at_ln_k_is_uniform_collapse(tmp_path, out_dim, told, start) -> None:
    plateau = (math.log(out_dim) + noise(6, 3e-4)).tolist()
    finding = found(tmp_path, [*start, *plateau], out_dim if told else None)
    assert finding.verdict == "uniform collapse"
    assert f"ln {out_dim} is {math.log(out_dim):.4f}" in finding.evidence[0]
    assert any("--teacher_temp" in line for line in finding.advice)
    assert ("--out-dim" in " ".join(finding.evidence)) != told


@pytest.mark.parametrize("level", [8.3178, 11.090, 8.318, 11.0904])
@pytest.mark.parametrize("count", [3, 10, 100])
def test_the_reported_plateaus(tmp_path, level, count) -> None:
    assert found(tmp_path, [level] * count).verdict == "uniform collapse"


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([0.4, 0.03, 0.004, 0.003, 0.003], "one-hot collapse"),
        ([9.0, 8.0, math.nan], "unstable"),
        ([9.0, 8.0, math.inf, 8.0], "unstable"),
        ([9.0, 5.0, 9.5, 4.0, 9.9, 10.2], "unstable"),
        ([6.1234] * 8, "not learning"),
    ],
)
def test_other_verdicts(tmp_path, losses, verdict) -> None:
    finding = found(tmp_path, losses)
    assert finding.verdict == verdict
    assert finding.evidence
    assert finding.advice


@pytest.mark.parametrize("out_dim", [4096, 65536])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_plateau(tmp_path, out_dim, told, seed) -> None:
    """Some epochs lie further off, their mean does not."""
    plateau = (math.log(out_dim) + 0.01 * np.random.default_rng(seed).standard_normal(60)).tolist()
    finding = found(tmp_path, [11.3, 10.2, 9.9, *plateau], out_dim if told else None)
    assert finding.verdict == "uniform collapse"
    assert f"ln {out_dim} is" in finding.evidence[0]


def test_a_short_run_near_0_is_one_hot(tmp_path) -> None:
    rows = [{"step": step, "phase": "train", "loss": max(5 - step / 20, 0.011)} for step in range(1, 160, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert diagnose(read_run(tmp_path)).verdict == "one-hot collapse"


@pytest.mark.parametrize(
    ("settings", "losses", "verdict"),
    [
        ("center_momentum: 1.0", (4.7, 0.8), "one-hot collapse"),
        ("center_momentum: 0.9", (4.7, 0.8), "healthy"),
        ("center_momentum: 1.0", (4.7, 3.8), "healthy"),
        ("student_temp: 0.04", (4.7, 4.8), "uniform collapse"),
        ("student_temp: 0.05", (4.7, 4.8), "healthy"),
        ("student_temp: 0.04", (4.7, 3.8), "healthy"),
        ("student_temp: sharp", (4.7, 4.8), "healthy"),
    ],
)
def test_a_run_without_visits_is_judged_with_its_settings(tmp_path, settings, losses, verdict) -> None:
    """What `diagnose_every: null` leaves: losses, and a configuration that says what was turned off."""
    head = "head: {name: DINOHead, out_dim: 128}"
    (tmp_path / "config.yaml").write_text(
        f"Model: {{name: DINO, {settings}, {head}}}\nSchedules: {{teacher_temp: {{name: Constant, value: 0.04}}}}\n"
    )
    rows = [
        {"step": step, "phase": "train", "loss": loss} for step, loss in enumerate(np.linspace(*losses, 200).tolist())
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert diagnose(read_run(tmp_path)).verdict == verdict


def test_advice_names_flags_as_they_are(tmp_path) -> None:
    advice = found(tmp_path, [8.3178] * 5).advice
    assert "--norm_last_layer: true" in advice
    assert "--use_bn_in_head: true, where the run is short or the network small" in advice


HEALTHY = {
    "one epoch": [11.09],
    "two epochs at the start": [11.0903, 11.0901],
    "leaves the plateau": [11.0902, 11.0899, 11.085, 11.02, 10.6, 9.8],
    "passes ln 4096": [8.6 - 0.04 * epoch for epoch in range(20)],
    "passes it slowly": [8.3278 - 0.0015 * epoch for epoch in range(14)],
    "as published": [11.0, 9.5, 8.1, 7.0, *(2.5 + 4.5 * math.exp(-epoch / 25) for epoch in range(300))],
    "flat at the end": [11.0, 9.5, 8.1, *(5.5452 + 4 * math.exp(-epoch / 5) for epoch in range(100))],
    "noisy near ln 4096, and falling": (8.34 - np.linspace(0, 0.05, 40) + noise(40, 0.005)).tolist(),
    "noisy beside ln 4096": (8.333 + noise(40, 0.01)).tolist(),
    "noisy": (4.0 + noise(50, 0.2)).tolist(),
    "grows as the teacher sharpens": [5.59, 5.78, 6.1, 6.3, 6.2, 6.0],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_logs(tmp_path, name) -> None:
    assert found(tmp_path, HEALTHY[name]).verdict == "healthy"


def test_a_known_number_of_prototypes_rules_out_the_others(tmp_path) -> None:
    assert (
        found(tmp_path, [8.3178, 8.3179, 8.31, 8.32, 8.29, 8.3178, 8.3178, 8.3178], out_dim=65536).verdict == "healthy"
    )


def test_a_probe_has_no_ln_k(tmp_path) -> None:
    losses = [6.9, math.log(256), math.log(256), math.log(256), math.log(256)]
    assert found(tmp_path, losses).verdict == "uniform collapse"
    assert found(tmp_path, losses, test_acc1=[25.0] * 5).verdict == "healthy"


def test_too_few_epochs_are_said_to_be(tmp_path) -> None:
    finding = found(tmp_path, [11.09, 11.08])
    assert finding.verdict == "healthy"
    assert "only 2 epochs: too early to rule out a collapse" in finding.evidence


@pytest.mark.parametrize(("end", "verdict"), [(1.1, "healthy"), (14.0, "unstable")])
def test_the_loss_of_a_probe_may_leap_if_it_comes_down_again(end: float, verdict: str) -> None:
    losses = [2.3, 14.3, 22.0, 8.0, 16.5, *np.linspace(1.3 * end, end, 20)]
    curve = [{"step": 20 * number, "loss": loss} for number, loss in enumerate(losses)]
    assert diagnose(Run(curve=curve, has_labels=True)).verdict == verdict
    assert diagnose(Run(curve=curve)).verdict == "unstable"
