"""The loss and its centre against recorded values of the official code."""

import numpy as np
import paddle
import pytest

from passl.models import DINOLoss
from tests.models.weights import assert_close


def recorded_losses(reference):
    """-> the loss, and for each successive call: its recorded arrays and its teacher temperature."""
    recorded = np.load(reference / "units.npz")
    out_dim, _, _, warmup_temp, temp, warmup_epochs, epochs, student_temp, momentum = recorded["loss/settings"]
    temps = np.full(int(epochs), temp)
    temps[: int(warmup_epochs)] = np.linspace(warmup_temp, temp, int(warmup_epochs))
    calls = []
    while f"loss/{len(calls)}/loss" in recorded:
        prefix = f"loss/{len(calls)}/"
        calls.append({key[len(prefix) :]: recorded[key] for key in recorded.files if key.startswith(prefix)})
    assert calls
    return DINOLoss(int(out_dim), student_temp, momentum), zip(calls, temps.tolist())


@pytest.mark.smoke
def test_losses_gradients_and_centers(reference, float64):
    loss_layer, calls = recorded_losses(reference)
    for index, (call, teacher_temp) in enumerate(calls):
        student = paddle.to_tensor(call["student"], stop_gradient=False)
        loss = loss_layer(student, paddle.to_tensor(call["teacher"]), teacher_temp)
        loss.backward()
        loss_layer.update_center()
        assert_close(loss.item(), call["loss"], 1e-10, f"loss {index}")
        assert_close(student.grad, call["grad_student"], 1e-10, f"gradient {index}")
        assert_close(loss_layer.center, call["center_after"], 1e-10, f"center {index}")


def test_accumulated_calls_are_one_large_batch(reference, float64):
    loss_layer, calls = recorded_losses(reference)
    call, teacher_temp = next(iter(calls))
    classes = call["student"].shape[1]
    batch = call["teacher"].shape[0] // 2
    losses = []
    for image in range(batch):
        student, teacher = (
            paddle.to_tensor(call[name].reshape(-1, batch, classes)[:, image]) for name in ("student", "teacher")
        )
        losses.append(loss_layer(student, teacher, teacher_temp).item())
    loss_layer.update_center()
    assert_close(np.mean(losses), call["loss"], 1e-10, "loss")
    assert_close(loss_layer.center, call["center_after"], 1e-10, "center")


def test_the_center_moves_only_when_told_and_in_training():
    loss_layer = DINOLoss(3)
    logits = paddle.to_tensor(np.arange(6, dtype="float32").reshape(2, 3))
    loss_layer.eval()
    loss_layer(logits, logits, 0.04)
    loss_layer.update_center()
    assert_close(loss_layer.center, np.zeros((1, 3)), 0.0)
    loss_layer.train()
    loss_layer(logits, logits, 0.04)
    assert_close(loss_layer.center, np.zeros((1, 3)), 0.0)
    loss_layer.update_center()
    loss_layer.update_center()  # nothing new: nothing happens
    assert_close(loss_layer.center, 0.1 * np.array([[1.5, 2.5, 3.5]]), 1e-6)


def test_peaked_logits_are_not_clamped(float64):
    """Paddle's CPU log_softmax stops at -64, that is at a loss of 64."""
    student = np.array([[0.0, -100.0], [0.0, -100.0]])
    loss = DINOLoss(2, student_temp=1.0)(paddle.to_tensor(student), paddle.to_tensor(student[:, ::-1].copy()), 0.04)
    assert_close(loss.item(), 100.0, 1e-10)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(9, 4), (2, 4), (6, 3)])
def test_row_counts_that_do_not_fit(student_rows, teacher_rows):
    with pytest.raises(ValueError, match=f"student_logits has {student_rows} rows and teacher_logits {teacher_rows}"):
        DINOLoss(5)(paddle.zeros([student_rows, 5]), paddle.zeros([teacher_rows, 5]), 0.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_temp": 0.0}, r"student_temp \(0.0\) must be positive"),
        ({"student_temp": float("nan")}, r"student_temp \(nan\) must be positive"),
        ({"center_momentum": 1.5}, r"center_momentum \(1.5\) must be in \[0, 1\]"),
        ({"center_momentum": -0.1}, r"center_momentum \(-0.1\) must be in \[0, 1\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(5, **arguments)


@pytest.mark.parametrize("teacher_temp", [0.0, -0.04])
def test_a_teacher_temperature_that_is_not_positive(teacher_temp):
    with pytest.raises(ValueError, match=rf"teacher_temp \({teacher_temp}\) must be positive"):
        DINOLoss(5)(paddle.zeros([4, 5]), paddle.zeros([4, 5]), teacher_temp)
