"""Schedules against recorded ones, and durations."""

import numpy as np
import pytest

from passl.schedules import Timeline, constant, cosine, timm_cosine


def test_cosine_schedules_as_recorded(reference):
    recorded = np.load(reference / "schedules.npz")
    for row, (base, final, epochs, steps_per_epoch, warmup_epochs, start) in enumerate(recorded["settings"]):
        expected = recorded[f"schedule{row}"]
        line = Timeline(len(expected), int(steps_per_epoch))
        assert line.by_epoch.total_steps == int(epochs)
        schedule = cosine(line, base, final, warmup=float(warmup_epochs), warmup_start=start)
        np.testing.assert_allclose([schedule(step) for step in range(len(expected))], expected, rtol=0, atol=1e-12)


def test_teacher_temperatures_as_recorded(reference):
    recorded = np.load(reference / "schedules.npz")
    keys = [key for key in recorded.files if key.startswith("teacher_temp") and not key.endswith("_settings")]
    assert keys
    for key in keys:
        start, temperature, warmup_epochs, epochs = recorded[f"{key}_settings"]
        line = Timeline(int(epochs) * 3, 3)
        schedule = cosine(
            line, temperature, temperature, warmup=float(warmup_epochs), warmup_start=start, per_epoch=True
        )
        actual = [schedule(step) for step in range(line.total_steps)]
        np.testing.assert_allclose(actual, np.repeat(recorded[key], 3), rtol=0, atol=1e-12)


def test_linear_probe_learning_rates_as_recorded(reference):
    recorded = np.load(reference / "linear.npz")
    for case in sorted({key.split("/")[0] for key in recorded.files if key.endswith("/lr_per_step")}):
        expected = recorded[f"{case}/lr_per_step"]
        epochs = len(recorded[f"{case}/order"])
        line = Timeline(len(expected), len(expected) // epochs)
        schedule = cosine(line, expected[0], 0.0, per_epoch=True)
        np.testing.assert_allclose([schedule(s) for s in range(len(expected))], expected, rtol=0, atol=1e-12)
        published = timm_cosine(line, expected[0])
        np.testing.assert_allclose([published(s) for s in range(len(expected))], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("10ep", 500), ("500it", 500), ("5%", 50), (2, 100), (0.5, 25), ("0.5ep", 25), ("1e2it", 100)],
)
def test_durations(duration, steps):
    assert Timeline(total_steps=1000, steps_per_epoch=50).steps(duration) == steps


@pytest.mark.parametrize("duration", ["10", "ten ep", "-1ep", "", "10epochs", -1, float("inf")])
def test_wrong_durations_name_the_value(duration):
    with pytest.raises(ValueError, match="duration"):
        Timeline(1000, 50).steps(duration)


def test_learning_rate_follows_the_global_batch():
    line = Timeline(10, 5, global_batch_size=1024)
    assert cosine(line, 0.0005, reference_batch_size=256)(0) == pytest.approx(0.002)
    assert cosine(line, 0.0005)(0) == 0.0005
    with pytest.raises(ValueError, match="reference_batch_size"):
        cosine(line, 0.0005, reference_batch_size=0)


@pytest.mark.parametrize("batch", [64, 1000, 1024, 4096])
def test_learning_rate_follows_the_square_root_of_the_global_batch(batch):
    """As DINOv2 has it: 0.004 * sqrt(batch / 1024), with its warm-up and end."""
    line = Timeline(100, 10, global_batch_size=batch)
    schedule = cosine(line, 0.004, 1e-6, warmup="10it", reference_batch_size=1024, batch_rule="sqrt")
    peak = 0.004 * np.sqrt(batch / 1024)
    cosine_part = 1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(np.pi * np.arange(90) / 90))
    expected = np.concatenate([np.linspace(0, peak, 10), cosine_part])
    np.testing.assert_allclose([schedule(step) for step in range(100)], expected, rtol=1e-12)


def test_wrong_batch_rules():
    with pytest.raises(ValueError, match=r"batch_rule \('root'\) must be one of linear, sqrt"):
        cosine(Timeline(10, 5), 0.1, reference_batch_size=256, batch_rule="root")
    with pytest.raises(ValueError, match=r"batch_rule \(sqrt\) needs a reference_batch_size"):
        cosine(Timeline(10, 5), 0.1, batch_rule="sqrt")


@pytest.mark.smoke
def test_teacher_temperatures_of_dinov2_change_with_each_step():
    """0.04 to 0.07 in a line over 30 epochs, both ends included, then constant."""
    line = Timeline(100 * 7, 7)
    schedule = cosine(line, 0.07, 0.07, warmup="30ep", warmup_start=0.04)
    expected = np.concatenate([np.linspace(0.04, 0.07, 30 * 7), np.full(70 * 7, 0.07)])
    np.testing.assert_allclose([schedule(step) for step in range(line.total_steps)], expected, rtol=1e-12)


@pytest.mark.parametrize("per_epoch", [False, True])
@pytest.mark.parametrize(
    ("warmup", "text"),
    [
        ("5it", r"warmup \(5it\) is 5 steps, longer than the run of 4 step.*Lower warmup or raise Global.epochs"),
        ("10ep", r"warmup \(10ep\) is 20 steps, longer than the run of 4 step"),
        (3, r"warmup \(3\) is 6 steps"),
        ("200%", r"warmup \(200%\) is 8 steps"),
    ],
)
def test_warmup_longer_than_the_run(warmup, text, per_epoch):
    with pytest.raises(ValueError, match=text):
        cosine(Timeline(4, 2), 1.0, warmup=warmup, per_epoch=per_epoch)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_timm_warmup_longer_than_the_run(unit):
    text = r"warmup_epoch \(3\) is .* longer than the run of .*Lower warmup_epoch or raise Global.epochs"
    with pytest.raises(ValueError, match=text):
        timm_cosine(Timeline(4, 2), 1.0, decay_unit=unit, warmup_epoch=3)


@pytest.mark.parametrize("warmup", ["4it", "2ep", 2, "100%"])
def test_warmup_as_long_as_the_run(warmup):
    line = Timeline(4, 2)
    np.testing.assert_allclose([cosine(line, 1.0, warmup=warmup)(s) for s in range(4)], np.arange(4) / 3)
    assert [cosine(line, 1.0, warmup=warmup, per_epoch=True)(s) for s in range(4)] == [0, 0, 1, 1]
    assert [timm_cosine(line, 1.0, warmup_epoch=2)(s) for s in range(4)] == [0, 0, 0.5, 0.5]
    assert [timm_cosine(line, 1.0, "step", warmup_epoch=2)(s) for s in range(4)] == [0, 0.25, 0.5, 0.75]


def test_constant():
    assert constant(Timeline(4, 2), 0.3)(3) == 0.3


def test_timm_cosine_warmup_and_units():
    line = Timeline(40, 4)
    by_epoch = timm_cosine(line, 1.0, warmup_epoch=2)
    assert [by_epoch(s) for s in (0, 3, 4, 7)] == [0.0, 0.0, 0.5, 0.5]
    assert by_epoch(8) == pytest.approx(0.5 * (1 + np.cos(np.pi * 2 / 10)))
    by_step = timm_cosine(line, 1.0, decay_unit="step", warmup_epoch=2)
    assert by_step(4) == 0.5
    with pytest.raises(ValueError, match="decay_unit"):
        timm_cosine(line, 1.0, decay_unit="iteration")
