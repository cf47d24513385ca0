"""k-NN against the official classifier's recorded predictions, votes and rates."""

import numpy as np
import pytest

from passl.evaluators import knn as knn_module
from passl.evaluators import knn_classify
from passl.evaluators.classification import accuracy


def cases(recorded):
    return sorted({"/".join(key.split("/")[:2]) for key in recorded.files if key.endswith("/results")})


def classify(recorded, case, k, temperature=0.07):
    name = case.split("/")[0]
    return knn_classify(
        recorded[f"{name}/train_features"],
        recorded[f"{case}/train_labels"],
        recorded[f"{name}/test_features"],
        k=k,
        temperature=temperature,
    )


@pytest.mark.smoke
def test_recorded_rates_predictions_and_votes(reference):
    recorded = np.load(reference / "knn.npz")
    assert cases(recorded)
    for case in cases(recorded):
        results = recorded[f"{case}/results"]
        labels = recorded[f"{case}/test_labels"]
        votes = classify(recorded, case, [int(row[0]) for row in results])
        for k, top1, _, low, high in results:
            found = votes[int(k)]
            sure = recorded[f"{case}/k{int(k)}/top1_margin"] > 1e-5
            np.testing.assert_array_equal(found.argmax(1)[sure], recorded[f"{case}/k{int(k)}/pred_top1"][sure])
            unsure = 100 * (~sure).mean()
            assert abs(accuracy(found, labels, 1) - top1) <= unsure + 1e-6
            assert low - 1e-4 <= accuracy(found, labels, min(5, int(k))) <= high + 1e-4
            if f"{case}/k{int(k)}/votes" in recorded:
                expected = recorded[f"{case}/k{int(k)}/votes"]
                np.testing.assert_allclose(found, expected[:, : found.shape[1]], rtol=2e-5, atol=1e-4 * expected.max())


def test_recorded_temperatures(reference):
    recorded = np.load(reference / "knn.npz")
    for key in (key for key in recorded.files if key.endswith("/T_sweep")):
        case = key.rsplit("/", 1)[0]
        labels = recorded[f"{case}/test_labels"]
        for temperature, top1, top5 in recorded[key]:
            # The sweep's k is not in the recording: it is the one whose rates at 0.07 are the sweep's.
            at_default = recorded[key][np.isclose(recorded[key][:, 0], 0.07)][0]
            k = next(int(row[0]) for row in recorded[f"{case}/results"] if np.allclose(row[1:3], at_default[1:]))
            votes = classify(recorded, case, [k], temperature)[k]
            assert accuracy(votes, labels, 1) == pytest.approx(top1, abs=1e-4)
            assert accuracy(votes, labels, 5) == pytest.approx(top5, abs=1e-4)


def test_chunks_do_not_matter(reference, monkeypatch):
    recorded = np.load(reference / "knn.npz")
    case = cases(recorded)[0]
    whole = classify(recorded, case, [20])[20]
    monkeypatch.setattr(knn_module, "_CHUNK_ELEMENTS", 7 * len(recorded[f"{case}/train_labels"]))
    np.testing.assert_allclose(classify(recorded, case, [20])[20], whole, rtol=1e-4)


def test_more_neighbours_than_images_and_a_single_test_image():
    train = np.eye(3, dtype=np.float32)
    votes = knn_classify(train, np.array([0, 1, 1]), train[:1], k=[10], temperature=1.0)[10]
    np.testing.assert_allclose(votes, [[np.e, 2.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": [0]}, "k "),
        ({"k": []}, "k "),
        ({"temperature": 0.0}, "temperature"),
        ({"train_labels": np.array([0, -1, 1])}, "label"),
        ({"test": np.zeros((0, 3), np.float32)}, "images"),
    ],
)
def test_wrong_arguments(change, text):
    arguments = {
        "train": np.eye(3, dtype=np.float32),
        "train_labels": np.array([0, 1, 1]),
        "test": np.eye(3, dtype=np.float32),
    }
    with pytest.raises(ValueError, match=text):
        knn_classify(**{**arguments, **change})
