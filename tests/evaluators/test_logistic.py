"""Logistic regression: at the minimum, where scikit-learn's is, and as a probe."""

from __future__ import annotations

import logging

import numpy as np
import paddle
import pytest
from PIL import Image

from passl import checkpoint
from passl.data.datasets import ImageFolder
from passl.data.loader import BadSamplesError
from passl.data.transforms import ToTensor
from passl.evaluators import Classification, LinearSweep, LogisticRegression, evaluate
from passl.evaluators.lbfgs import minimize
from passl.evaluators.logistic import _held_out, fit_logistic
from passl.models import LinearProbe, VisionTransformer
from tests.engine import tiny


def problem(classes: int = 4, count: int = 90, width: int = 6):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    rows = rng.standard_normal((count, width)) + 0.7 * rng.standard_normal((classes, width))[labels]
    return rows * [1, 5, 0.2, 1, 3, 1], labels


def objective(rows, labels, weight, bias, strength) -> float:
    logits = rows @ weight + bias
    shifted = logits - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return loss.mean() + (weight**2).sum() / (2 * strength * len(labels))


@pytest.mark.smoke
@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e4])
def test_the_minimum(strength):
    """The gradient, worked out apart, is zero, and no step in any direction leads lower."""
    rows, labels = problem()
    weight, bias, is_done = fit_logistic(rows, labels, 4, strength, tolerance=1e-9)
    assert is_done
    logits = rows @ weight + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    residual = p / p.sum(1, keepdims=True) - np.eye(4)[labels]
    np.testing.assert_allclose(rows.T @ residual + weight / strength, 0, atol=1e-6)
    np.testing.assert_allclose(residual.sum(0), 0, atol=1e-6)
    lowest, rng = objective(rows, labels, weight, bias, strength), np.random.default_rng(0)
    for _ in range(50):
        step = 1e-3 * rng.standard_normal(weight.shape)
        assert objective(rows, labels, weight + step, bias + 1e-3 * rng.standard_normal(4), strength) > lowest


@pytest.mark.parametrize("strength", [1.0, 100.0, 1e4])
def test_the_minimum_of_classes_without_mistakes(strength):
    """Where gradients are small far from it."""
    rows, labels = problem()
    rows[:, 0] += 20 * labels
    found = []
    for tolerance in (1e-6, 1e-10):
        weight, bias, is_done = fit_logistic(rows, labels, 4, strength, tolerance=tolerance)
        assert is_done
        found.append(objective(rows, labels, weight, bias, strength))
    assert found[0] < 1.001 * found[1]


def test_images_of_one_class_of_several_have_an_end():
    """The bias alone could grow for ever."""
    rows, labels = problem()
    for strength in (1e-3, 1.0, 100.0, 1e6):
        weight, bias, is_done = fit_logistic(rows, np.ones_like(labels), 3, strength)
        assert is_done
        assert np.isfinite(weight).all()
        assert bias.argmax() == 1


@pytest.mark.parametrize("classes", [2, 4])
def test_scikit_learn_is_at_the_same_point(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, labels = problem(classes)
    for strength in (0.01, 3.0):
        theirs = linear_model.LogisticRegression(C=strength, tol=1e-10, max_iter=10000).fit(rows, labels)
        weight, bias, _ = fit_logistic(rows, labels, classes, strength, tolerance=1e-10)
        if classes > 2:
            np.testing.assert_allclose(weight.T, theirs.coef_, atol=1e-5)
            np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-5)
        else:
            # Of two classes scikit-learn has one weight vector, so that the penalty counts half of ours twice.
            double = linear_model.LogisticRegression(C=2 * strength, tol=1e-10, max_iter=10000).fit(rows, labels)
            np.testing.assert_allclose(weight[:, 1] - weight[:, 0], double.coef_[0], atol=1e-5)


def test_lbfgs_on_the_rosenbrock_function():
    def rosenbrock(x):
        a, b = x[1:] - x[:-1] ** 2, 1 - x[:-1]
        gradient = np.zeros_like(x)
        gradient[1:] += 200 * a
        gradient[:-1] += -400 * x[:-1] * a - 2 * b
        return float((100 * a**2 + b**2).sum()), gradient

    x, is_done = minimize(rosenbrock, np.full(10, -1.0), tolerance=1e-9)
    assert is_done
    # With ten variables there is a second minimum close to the start.
    value, gradient = rosenbrock(x)
    assert np.abs(gradient).max() <= 1e-9
    assert value < 4
    assert not minimize(rosenbrock, np.full(10, -1.0), max_iterations=3)[1]


def test_held_out_images():
    labels = np.repeat([0, 1, 2, 5], [10, 1, 2, 7])
    held = _held_out(labels, 0.2, 0)
    assert [int(held[labels == label].sum()) for label in (0, 1, 2, 5)] == [2, 0, 1, 2]
    assert (held == _held_out(labels, 0.2, 0)).all()


# --- the evaluator ---


def vit() -> VisionTransformer:
    return VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=2)


@pytest.fixture
def backbone():
    paddle.seed(0)
    network = vit()
    network.eval()
    return network


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path, size=16)
    return tmp_path


def logistic(folder, **arguments) -> LogisticRegression:
    return LogisticRegression(*(ImageFolder(folder / split, ToTensor()) for split in ("train", "val")), **arguments)


@pytest.mark.smoke
@pytest.mark.parametrize("standardize", [False, True])
def test_as_a_probe(folder, backbone, standardize):
    arguments = {"n_last_blocks": 2, "avgpool": True, "standardize": standardize}
    result = evaluate(logistic(folder, **arguments), backbone, folder)
    assert set(result) == {"logistic_top1", "logistic_top5", "logistic_loss", "logistic_C"}
    assert result == evaluate(logistic(folder, **arguments), backbone, folder), "nothing is drawn"
    probe = LinearProbe(vit, 3, 2, True)
    checkpoint.load_weights(probe, checkpoint.read_weights(folder / "logistic"))
    scored = evaluate(Classification(ImageFolder(folder / "val", ToTensor())), probe, folder)
    assert scored["top1"] == pytest.approx(result["logistic_top1"])
    assert scored["loss"] == pytest.approx(result["logistic_loss"], abs=1e-4)


def test_standardisation_is_of_the_training_images(folder, backbone):
    """The same minimum as on features that were divided beforehand."""
    rows, labels = problem()
    chosen = logistic(folder, standardize=True, C=0.5, tolerance=1e-10)
    weight, bias = chosen._fitted(rows, labels, 4, 0.5)
    scaled = (rows - rows.mean(0)) / rows.std(0)
    expected = fit_logistic(scaled, labels, 4, 0.5, tolerance=1e-10)
    np.testing.assert_allclose(rows @ weight + bias, scaled @ expected[0] + expected[1], atol=1e-6)


def test_c_is_chosen_on_training_images_alone(folder, backbone, caplog):
    with caplog.at_level(logging.INFO, "passl"):
        first = evaluate(logistic(folder), backbone, folder)
    assert caplog.text.count("on held-out training images") == 6
    for path in (folder / "val").rglob("*.png"):
        Image.new("RGB", (16, 16)).save(path)
    assert evaluate(logistic(folder), backbone, folder)["logistic_C"] == first["logistic_C"]


def test_a_name_of_its_own(folder, backbone):
    second = logistic(folder, file="second", C=1.0)
    assert second.result_names() == ["second_top1"]
    assert set(evaluate(second, backbone, folder)) == {"second_top1", "second_top5", "second_loss", "second_C"}


def test_features_are_shared_with_the_sweep(folder, backbone, caplog):
    sets = [ImageFolder(folder / split, ToTensor()) for split in ("train", "val")]
    evaluate(LinearSweep(*sets, n_last_blocks=[1, 2], epochs=1, cache=True), backbone, folder)
    caplog.clear()
    with caplog.at_level(logging.INFO, "passl"):
        cached = evaluate(logistic(folder, cache=True), backbone, folder)
    assert caplog.text.count("features from ") == 2
    assert cached == evaluate(logistic(folder), backbone, folder)


@pytest.mark.parametrize("counts", [{"a": 1}, {"a": 2}, {"a": 1, "b": 1}])
def test_few_images_and_one_class(tmp_path, backbone, counts):
    for split in ("train", "val"):
        for number, (name, count) in enumerate(counts.items()):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (16, 16), (200 * number, 30 * index, 0)).save(tmp_path / split / name / f"{index}.png")
    result = evaluate(logistic(tmp_path), backbone, tmp_path)
    assert result["logistic_top1"] == 100, "the validation images are the training images"


def test_bad_files(folder, backbone):
    clean = evaluate(logistic(folder), backbone, folder)
    (folder / "train/class0/bad.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    assert evaluate(logistic(folder), backbone, folder) == clean
    for path in (folder / "train").rglob("*.*"):
        path.write_bytes(b"nothing")
    with pytest.raises(BadSamplesError, match="cannot be read"):
        evaluate(logistic(folder), backbone, folder)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"C": 0}, r"C \(0\) must be one or more numbers above 0"),
        ({"C": []}, r"C \(\[\]\) must be"),
        ({"hold_out": 1.0}, r"hold_out \(1.0\) must be above 0 and below 1"),
        ({"tolerance": 0}, r"tolerance \(0\) above 0"),
        ({"n_last_blocks": 0}, r"n_last_blocks \(0\) must be at least 1"),
        ({"file": "../x"}, r"file \('../x'\) must be a name"),
    ],
)
def test_wrong_arguments(folder, arguments, text):
    with pytest.raises(ValueError, match=text):
        logistic(folder, **arguments)


def test_too_few_iterations_are_told(folder, backbone, caplog):
    evaluate(logistic(folder, max_iterations=1, C=100.0), backbone, folder)
    assert "C 100: not at the minimum after 1 iterations: raise max_iterations" in caplog.text
