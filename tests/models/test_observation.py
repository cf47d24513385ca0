"""What DINO tells about a step, against the definitions in float64."""

from __future__ import annotations

import functools
import gc
import weakref

import numpy as np
import paddle
import pytest

from passl.models import DINO, DINOHead, VisionTransformer
from passl.models.dinov2 import DINOv2
from passl.models.observation import effective_rank

B, K, TEMP = 5, 37, 0.04


@pytest.fixture
def method() -> DINO:
    paddle.seed(0)
    backbone = functools.partial(VisionTransformer, img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2)
    head = functools.partial(DINOHead, out_dim=K, hidden_dim=12, bottleneck_dim=8)
    method = DINO(backbone, head)
    method.train()
    for parameter in method.student.parameters():  # so that it is not the teacher
        parameter.set_value(parameter + 0.05 * paddle.randn(parameter.shape))
    method.dino_loss.center.set_value(0.1 * paddle.randn([1, K]))
    return method


@pytest.fixture
def batch() -> dict:
    rng = np.random.default_rng(0)
    crops = {"global_crops": (2 * B, 3, 16, 16), "local_crops": (3 * B, 3, 8, 8)}
    return {name: paddle.to_tensor(rng.standard_normal(shape, np.float32)) for name, shape in crops.items()}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


@pytest.mark.smoke
def test_against_plain_forward_passes(method, batch) -> None:
    center = method.dino_loss.center.numpy().astype(np.float64)
    features = {name: getattr(method, name).backbone(batch["global_crops"]) for name in ("student", "teacher")}
    logits = {name: getattr(method, name).head(x).numpy().astype(np.float64) for name, x in features.items()}
    method.observe()
    method(batch, teacher_temp=TEMP)
    method.after_step(teacher_momentum=0.5)  # the centre moves, and that must not matter
    numbers = method.diagnostics()

    teacher = softmax((logits["teacher"] - center) / TEMP)
    student = softmax(logits["student"] / 0.1)
    swapped = np.concatenate([teacher[B:], teacher[:B]])
    expected = {
        "out_dim": K,
        "student_temp": 0.1,
        "teacher_entropy": entropy(teacher).mean(),
        "teacher_mean_entropy": entropy(teacher.mean(0)),
        "student_teacher_kl": (swapped * np.log(swapped / student)).sum(-1).mean(),
        "prototypes_in_use": len(set(teacher.argmax(-1))),
        "center_norm": np.linalg.norm(center),
    }
    for name, prefix in (("teacher", ""), ("student", "student_")):
        unit = features[name].numpy().astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        expected[f"{prefix}feature_std"] = np.sqrt(unit.var(0).sum())
        if name == "teacher":
            values = np.linalg.svd(unit, compute_uv=False)
            expected["effective_rank"] = np.exp(entropy(values / values.sum()))
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("has_ibot_head", [False, True])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_dinov2(batch, centering, has_ibot_head) -> None:
    """Features and logits of whole images, although the heads see patches too; answers as in the loss."""
    paddle.seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "mask_token": True}
    backbone = functools.partial(VisionTransformer, **sizes)
    head = functools.partial(DINOHead, out_dim=K, hidden_dim=12, bottleneck_dim=8)
    method = DINOv2(backbone, head, ibot_head=head if has_ibot_head else None, centering=centering)
    method.train()
    for parameter in method.student.parameters():
        parameter.set_value(parameter + 0.05 * paddle.randn(parameter.shape))
    batch["masks"] = paddle.to_tensor(np.random.default_rng(0).random((2 * B, 4)) < 0.5)
    method.observe()
    method(batch, teacher_temp=TEMP)
    numbers = method.diagnostics()

    features = method.teacher.backbone(batch["global_crops"])
    logits = method.teacher.head(features).numpy().astype(np.float64)
    answers = softmax(logits / TEMP)
    if centering == "sinkhorn":
        answers = np.exp(logits / TEMP)
        for _ in range(3):
            answers /= answers.sum(0)
            answers /= answers.sum(1, keepdims=True)
    unit = features.numpy().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = {
        "out_dim": K,
        "teacher_entropy": entropy(answers).mean(),
        "teacher_mean_entropy": entropy(answers.mean(0)),
        "prototypes_in_use": len(set(answers.argmax(-1))),
        "feature_std": np.sqrt(unit.var(0).sum()),
    }
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert np.isfinite(list(numbers.values())).all()
    # A centre of 0 would tell the doctor that centring is off.
    assert ("center_norm" in numbers) == (centering == "softmax")


def test_extreme_logits_have_exact_entropies(method, batch) -> None:
    """Paddle's CPU softmax would give every prototype exp(-64) at least."""
    for network in (method.student, method.teacher):
        network.head.last_layer.weight_g.set_value(paddle.full([K], 1000.0))
    method.observe()
    method(batch, teacher_temp=TEMP)
    numbers = method.diagnostics()
    assert numbers["teacher_entropy"] == pytest.approx(0.0, abs=1e-5)
    assert np.isfinite(list(numbers.values())).all()


def test_nothing_is_kept_and_nothing_changed(method, batch) -> None:
    plain = method(batch, teacher_temp=TEMP)["loss"].item()
    method.dino_loss.forget()
    method.observe()
    observation = weakref.ref(method._observation)
    assert method(batch, teacher_temp=TEMP)["loss"].item() == plain
    assert method.diagnostics()
    assert method.diagnostics() == {}, "it was forgotten"
    gc.collect()
    assert observation() is None
    hooked = (method.student.head, method.teacher.head, method.dino_loss)
    assert not any(layer._forward_pre_hooks for layer in hooked)
    method.observe()
    method.observe()  # the step in between was left out
    method.diagnostics()
    assert not any(layer._forward_pre_hooks for layer in hooked)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_effective_rank(shape) -> None:
    n, width = shape
    assert effective_rank(np.ones(shape)) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(np.eye(n, width)) == pytest.approx(min(n, width))
    two = np.zeros(shape)
    two[::2, 0], two[1::2, 1] = 1.0, 1.0
    assert effective_rank(two) == pytest.approx(2.0)
    assert np.isnan(effective_rank(np.full(shape, np.nan)))
