"""Metrics against values worked out by hand, the definitions, and scikit-learn where it is installed."""

import itertools

import numpy as np
import pytest
from PIL import Image

from passl.evaluators import metrics
from passl.evaluators.confusion import draw_confusion


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),  # three pairs right, one equal
    ],
)
def test_auc_by_hand(scores, positive, expected):
    assert metrics.auc(np.array(scores), np.array(positive, bool)) == expected


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores, positive = rng.integers(0, 6, 30), rng.random(30) < 0.3
        pairs = list(itertools.product(scores[positive], scores[~positive]))
        expected = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
        assert metrics.auc(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_auc_needs_both_kinds():
    assert np.isnan(metrics.auc(np.ones(3), np.ones(3, bool)))
    assert np.isnan(metrics.auc(np.ones(3), np.zeros(3, bool)))
    assert np.isnan(metrics.auc(np.ones(0), np.zeros(0, bool)))


def test_scikit_learn_agrees():
    theirs = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 5, 200), rng.standard_normal((200, 5)).round(1)
    log_probabilities = metrics.log_softmax(logits)
    expected = theirs.roc_auc_score(labels, np.exp(log_probabilities), multi_class="ovr")
    assert metrics.one_vs_rest_auc(log_probabilities, labels).mean() == pytest.approx(expected, abs=1e-12)
    predicted = logits.argmax(1)
    confusion = metrics.confusion_matrix(predicted, labels, 5)
    np.testing.assert_array_equal(confusion, theirs.confusion_matrix(labels, predicted))
    expected = 100 * theirs.balanced_accuracy_score(labels, predicted)
    assert metrics.balanced_accuracy(confusion) == pytest.approx(expected)
    np.testing.assert_allclose(
        metrics.precisions(confusion), 100 * theirs.precision_score(labels, predicted, average=None)
    )


def test_confusion_by_hand():
    confusion = metrics.confusion_matrix(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), 3)
    assert confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(metrics.recalls(confusion), [200 / 3, 100, np.nan])
    np.testing.assert_allclose(metrics.precisions(confusion), [100, 50, np.nan])
    assert metrics.balanced_accuracy(confusion) == pytest.approx((200 / 3 + 100) / 2), "classes without images are out"


@pytest.mark.parametrize("count", [2, 10, 40, 130])
def test_pictures(tmp_path, count):
    """Right cells are green, wrong ones red, whatever the size; names may hold anything."""
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 3, (count, count)) * (rng.random((count, count)) < 0.2) + 20 * np.eye(count, dtype=int)
    confusion[:2] = 0
    confusion[1, :2] = 4, 6  # and a class without images
    names = [f"$x_{number} % with a long name" for number in range(count)]
    picture = Image.open(draw_confusion(confusion, names, tmp_path / "new" / "c.png")).convert("RGB")
    assert min(picture.size) > 400
    assert max(picture.size) < 2500
    pixels = np.asarray(picture).astype(int).reshape(-1, 3)
    green = (pixels[:, 1] > pixels[:, 0] + 40).sum()
    red = (pixels[:, 0] > pixels[:, 1] + 20).sum()
    assert green > 500
    assert red > 500


def test_pictures_of_nothing_and_of_all_right(tmp_path):
    draw_confusion(np.zeros((2, 2), int), ["a", "b"], tmp_path / "0.png")
    draw_confusion(np.eye(3, dtype=int), ["a", "b", "c"], tmp_path / "1.png")
