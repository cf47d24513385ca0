"""The losses of DINOv2 against recorded values of the official code."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl.models import DINOLoss
from passl.models.centering import sinkhorn_knopp
from passl.models.dinov2 import IBOTLoss
from passl.models.dinov2.method import hidden_patches
from passl.models.functional import cross_entropy
from tests.models.weights import assert_close

STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9  # the official code's, in every recording


def cases(reference, group: str) -> list[dict[str, np.ndarray]]:
    """The recorded arrays of each case of a group; its last one has the group's own too, such as center_final."""
    recorded = np.load(reference / "dinov2_losses.npz")
    found: dict[int, dict[str, np.ndarray]] = {}
    for name in recorded.files:
        parts = name.split("/")
        if parts[0] == group and len(parts) == 3:
            found.setdefault(int(parts[1]), {})[parts[2]] = recorded[name]
    assert found
    ordered = [found[number] for number in sorted(found)]
    for case, following in zip(ordered, ordered[1:]):
        case["center_next"] = following["center_used"]
    if f"{group}/center_final" in recorded:
        ordered[-1]["center_next"] = recorded[f"{group}/center_final"]
    return ordered


def with_gradient(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array, stop_gradient=False)


# --- DINO between views ---


@pytest.mark.smoke
def test_centres_follow_their_teachers(reference, float64) -> None:
    """The official code moves its centre at the next call, ours at the end of the step: the centre in use is one."""
    loss = None
    for number, case in enumerate(cases(reference, "dino")):
        if loss is None:
            loss = DINOLoss(case["teacher"].shape[1], STUDENT_TEMP, CENTER_MOMENTUM)
            loss.center.set_value(paddle.to_tensor(case["center_used"]))
        assert_close(loss.center, case["center_used"], 1e-9, f"centre {number}")
        targets = loss.targets(paddle.to_tensor(case["teacher"]), float(case["temp"]))
        assert_close(targets, case["softmax_center"], 1e-9, f"targets {number}")
        assert_close(loss.center, case["center_used"], 1e-9, f"centre {number} before the end of its step")
        loss.update_center()
        assert_close(loss.center, case["center_next"], 1e-9, f"centre after {number}")


def test_local_and_global_terms(reference, float64) -> None:
    """As the official code has them: each a sum over pairs of views, of means over images."""
    for number, case in enumerate(cases(reference, "dino")):
        targets = paddle.to_tensor(case["softmax_center"])
        batch = targets.shape[0] // 2
        first, second = targets.chunk(2)
        local = with_gradient(case["student_local"])
        num_local = local.shape[0] // batch
        loss = sum(
            cross_entropy(view / STUDENT_TEMP, teacher).mean()
            for view in local.chunk(num_local)
            for teacher in (first, second)
        )
        loss.backward()
        assert_close(loss.item(), case["loss_local_undivided"], 1e-9, f"local {number}")
        assert_close(local.grad, case["grad_local"], 1e-9, f"gradient of local {number}")
        # Of the global crops the recorded pairs are those of equal rows; who calls it has swapped the teacher's views.
        student = with_gradient(case["student_global"])
        loss = cross_entropy(student / STUDENT_TEMP, targets).mean()
        loss.backward()
        assert_close(loss.item(), case["loss_global_undivided"], 1e-9, f"global {number}")
        assert_close(student.grad, case["grad_global"], 1e-9, f"gradient of global {number}")


def official_loss(student: np.ndarray, case: dict, num_local: int) -> tuple[float, np.ndarray]:
    """(local + 2 * global) / number of terms, and its gradient, from the official loss's recorded targets.

    student: [(2 + num_local) * B, K], the global crops first.
    """
    teacher = case["softmax_center"]
    half = len(teacher) // 2
    scaled = student / STUDENT_TEMP
    scaled = scaled - scaled.max(1, keepdims=True)
    log_probabilities = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    swapped = np.concatenate([teacher[half:], teacher[:half]])
    local = np.split(log_probabilities[2 * half :], num_local)
    local_sum = sum(-(target * view).sum(1).mean() for view in local for target in (teacher[:half], teacher[half:]))
    global_mean = -(swapped * log_probabilities[: 2 * half]).sum(1).mean()  # over both crops at once: two terms
    return (local_sum + 2 * global_mean) / (2 + 2 * num_local)


@pytest.mark.parametrize("num_local", [1, 8])
def test_the_terms_of_dinov2_are_the_pairs_of_dino(reference, float64, num_local) -> None:
    """With 8 local crops (2 * 8 local and 2 global) / 18 terms."""
    for number, case in enumerate(cases(reference, "dino")):
        rows, out_dim = case["teacher"].shape
        rng = np.random.default_rng(number)
        local = rng.standard_normal((num_local * rows // 2, out_dim))
        student = np.concatenate([case["student_global"], local])
        loss = DINOLoss(out_dim, STUDENT_TEMP)
        loss.center.set_value(paddle.to_tensor(case["center_used"]))
        found = loss(paddle.to_tensor(student), paddle.to_tensor(case["teacher"]), float(case["temp"]))
        assert_close(found.item(), official_loss(student, case, num_local), 1e-9, str(number))


def test_recorded_terms_sum_to_our_loss(reference, float64) -> None:
    """Loss and gradient, once the recorded pairs of global crops are those of the swapped teacher."""
    for number, case in enumerate(cases(reference, "dino")):
        rows, out_dim = case["teacher"].shape
        half = rows // 2
        num_local = len(case["student_local"]) // half
        terms = 2 + 2 * num_local
        # The recorded student's rows meet the teacher's of the same place: with its views swapped, the other view's.
        student = np.concatenate([case["student_global"][half:], case["student_global"][:half], case["student_local"]])
        student = with_gradient(student)
        loss = DINOLoss(out_dim, STUDENT_TEMP)
        loss.center.set_value(paddle.to_tensor(case["center_used"]))
        found = loss(student, paddle.to_tensor(case["teacher"]), float(case["temp"]))
        found.backward()
        expected = (case["loss_local_undivided"] + 2 * case["loss_global_undivided"]) / terms
        assert_close(found.item(), expected, 1e-9, str(number))
        swapped = np.concatenate([case["grad_global"][half:], case["grad_global"][:half]])
        gradient = np.concatenate([2 * swapped, case["grad_local"]]) / terms
        assert_close(student.grad, gradient, 1e-9, str(number))


# --- iBOT between patches ---


def temperature_of(logits: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature of a softmax or of Sinkhorn-Knopp, of which it is recorded only in what came of it."""

    def centred(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1, x.shape[-1]).astype(np.float64)
        return x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()

    # Columns in which no probability is too small for its type to tell.
    told = (probabilities.reshape(-1, logits.shape[-1]) > np.finfo(probabilities.dtype).tiny).all(0)
    x = centred(logits[..., told])
    return round((x * x).sum() / (x * centred(np.log(probabilities[..., told]))).sum(), 4)


def ibot_loss(case: dict) -> IBOTLoss:
    loss = IBOTLoss(case["teacher"].shape[-1], STUDENT_TEMP, CENTER_MOMENTUM)
    loss.center.set_value(paddle.to_tensor(case["center_used"][0]))
    return loss


@pytest.mark.smoke
def test_hidden_patches_of_images(reference, float64) -> None:
    """Targets, losses and gradients; those of all patches with a mask, and those of the hidden ones alone, are one."""
    for number, case in enumerate(cases(reference, "ibot")):
        loss = ibot_loss(case)
        temp = temperature_of(case["teacher"] - case["center_used"], case["softmax_center"])
        num_images, num_patches, out_dim = case["teacher"].shape
        mask = case["mask"].astype(bool)
        indices, weights = hidden_patches(paddle.to_tensor(mask))
        np.testing.assert_array_equal(indices.numpy(), np.flatnonzero(mask))
        student = with_gradient(case["student"])
        chosen = student.reshape([-1, out_dim]).index_select(indices)
        teacher = paddle.to_tensor(case["teacher"]).reshape([-1, out_dim])
        assert_close(
            loss.targets(teacher, temp), case["softmax_center"].reshape(-1, out_dim), 1e-9, f"targets {number}"
        )
        loss.forget()
        exact = paddle.to_tensor(1.0 / mask.sum(1).clip(1).repeat(num_patches)[mask.ravel()])
        assert_close(weights, exact, 1e-7, f"weights {number}")
        found = loss(chosen, teacher.index_select(indices), exact, num_images, temp)
        found.backward()
        assert_close(found.item(), case["forward"], 1e-9, f"loss {number}")
        assert_close(found.item(), case["forward_masked"], 1e-9, f"loss of hidden patches {number}")
        assert_close(student.grad, case["grad_forward"], 1e-9, f"gradient {number}")
        own = student.grad.numpy().reshape(-1, out_dim)[mask.ravel()]
        assert_close(own, case["grad_forward_masked"], 1e-9, f"gradient of hidden patches {number}")


def test_given_weights_and_no_padding(reference, float64) -> None:
    """The official code may pad the patches with empty rows: its loss leaves them out, and ours has none."""
    for number, case in enumerate(cases(reference, "ibot")):
        loss = ibot_loss(case)
        temp = temperature_of(case["teacher"] - case["center_used"], case["softmax_center"])
        mask = case["mask"].astype(bool)
        student, teacher, weights = (
            paddle.to_tensor(x) for x in (case["student"][mask], case["teacher"][mask], case["masks_weight"])
        )
        found = loss(student, teacher, weights, len(mask), temp)
        assert_close(found.item(), case["forward_masked_padded_weighted"], 1e-9, str(number))


def test_centres_of_patches(reference, float64) -> None:
    previous = None
    for number, case in enumerate(cases(reference, "ibot")):
        mask = case["mask"].astype(bool)
        fresh = IBOTLoss(case["teacher"].shape[-1], STUDENT_TEMP, CENTER_MOMENTUM)
        fresh.targets(paddle.to_tensor(case["teacher"][mask]), 0.05)
        fresh.update_center()
        assert_close(fresh.center, case["center_after_one_masked_update"][0], 1e-9, f"hidden patches {number}")
        loss = previous or ibot_loss(case)
        loss.targets(paddle.to_tensor(case["teacher"]).flatten(0, 1), 0.05)
        loss.update_center()
        assert_close(loss.center, case["center_next"][0], 1e-9, f"all patches {number}")
        previous = loss


def test_assignments_of_patches(reference) -> None:
    """Rows of padding would change the official result; without them ours is the same."""
    for number, case in enumerate(cases(reference, "ibot")):
        logits = case["sinkhorn_teacher"]
        temp = temperature_of(logits, case["sinkhorn"])
        loss = IBOTLoss(logits.shape[1], STUDENT_TEMP, centering="sinkhorn")
        found = loss.targets(paddle.to_tensor(logits), temp)
        assert_close(found, case["sinkhorn"], 1e-6, str(number))
        assert_close(found, sinkhorn_knopp(paddle.to_tensor(logits), temp), 0.0)
        assert np.abs(case["sinkhorn_padded2"][: len(logits)] - case["sinkhorn"]).max() > 1e-3
        loss.update_center()
        assert_close(loss.center, np.zeros((1, logits.shape[1])), 0.0)


def test_losses_with_assignments() -> None:
    """Both losses with Sinkhorn-Knopp: finite and with a gradient, also of logits in half precision."""
    for scale in (1.0, 6e4):
        logits = paddle.to_tensor((scale * np.random.default_rng(0).uniform(-1, 1, (8, 6))).astype("float16"))
        student = with_gradient(logits.numpy().astype("float32"))
        loss = DINOLoss(6, centering="sinkhorn")(student, logits[:4], 0.04)
        weights = paddle.full([8], 0.5)
        loss = loss + IBOTLoss(6, centering="sinkhorn")(student, logits, weights, 4, 0.04)
        loss.backward()
        assert loss.dtype == paddle.float32
        assert np.isfinite(loss.item())
        assert np.isfinite(student.grad.numpy()).all()
