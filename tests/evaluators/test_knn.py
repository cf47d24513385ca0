"""k-NN against the official classifier's recorded predictions, votes and rates."""

import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.data.datasets import ImageList
from passl.data.samples import Samples
from passl.data.transforms import ToTensor
from passl.evaluators import (
    KNN,
    Classification,
    LinearSweep,
    LogisticRegression,
    evaluate,
    knn_classify,
    neighbours,
)
from passl.evaluators import knn as knn_module
from passl.evaluators.classification import accuracy
from passl.evaluators.knn import normalize
from passl.models import Method


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
    monkeypatch.setattr(knn_module, "_CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(neighbours, "_MOST_ROWS", 7)
    monkeypatch.setattr(neighbours, "_BLOCK", 23)
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
        ({"temperature": float("nan")}, "temperature"),
        ({"train_labels": np.array([0, 1, 20250101])}, r"largest training label \(20250101\) .*: number the classes"),
        ({"test": np.array([[1, 0, 0], [np.nan, 0, 1]], np.float32)}, "1 of 2 test feature rows .*the weights are"),
        ({"train": np.diag([1, np.inf, -np.inf]).astype(np.float32)}, "2 of 3 train feature rows are not finite"),
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


# --- the search ---


def by_sorting(train, rows, count):
    """Of equal products the earlier row."""
    products = rows @ train.T
    order = np.argsort(-products, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(products, order, axis=1), order


@pytest.mark.smoke
@pytest.mark.parametrize("search", [neighbours._by_numpy, neighbours._by_paddle])
@pytest.mark.parametrize("count", [1, 5, 60, 900])
@pytest.mark.parametrize("block", [50, 128, 1000])
def test_neighbours_are_those_of_a_whole_sort(search, count, block):
    rng = np.random.default_rng(count)
    # Whole numbers: products are exact, and many are equal.
    train, rows = (rng.integers(-2, 3, (size, 6)).astype(np.float32) for size in (900, 33))
    # In the order of their likeness to the first row, best last: every block replaces what was found before.
    train = train[np.argsort(train @ rows[0], kind="stable")]
    if search is neighbours._by_paddle:
        train += rng.standard_normal(train.shape).astype(np.float32)  # topk has no order of equals
    values, indices = search(train, rows, count, block)
    expected, order = by_sorting(train, rows, count)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(indices, order)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_all_equal_rows_are_taken_in_their_order(value, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 64)
    train = np.full((500, 4), value, np.float32)
    for start, values, indices in neighbours.nearest(train, train[:7], 20):
        assert start == 0
        np.testing.assert_array_equal(indices, np.tile(np.arange(20), (7, 1)))
        np.testing.assert_array_equal(values, np.full((7, 20), 4 * value * value))


# --- the evaluators ---


def dataset(labels, class_names=()):
    return SimpleNamespace(labels=np.asarray(labels), class_names=list(class_names))


def results(monkeypatch, train, train_labels, val, val_labels, **arguments):
    """Of a KNN evaluator whose data sets have these features."""
    evaluator = KNN(dataset(train_labels), dataset(val_labels), **arguments)
    features = {id(evaluator.train_dataset): train, id(evaluator.val_dataset): val}
    rows_of = lambda _, source, *rest, **loading: (features[id(source)], source.labels, None)  # noqa: E731
    monkeypatch.setattr(knn_module, "map_dataset", rows_of)
    return evaluator.run(paddle.nn.Identity(), Path())


def unit_rows(rng, count, width=8):
    rows = rng.standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_rates_are_those_of_all_votes_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    train, val = unit_rows(rng, 300), unit_rows(rng, 101)
    train_labels, val_labels = rng.integers(0, 12, 300), rng.integers(0, 12, 101)
    expected = knn_classify(train, train_labels, val, [50, 90])
    monkeypatch.setattr(neighbours, "_MOST_ROWS", 7)
    found = results(monkeypatch, train, train_labels, val, val_labels, k=[50, 90, 50])
    assert len(found) == 4
    for k, votes in expected.items():
        for top in (1, 5):
            assert found[f"knn_top{top}_k{k}"] == pytest.approx(accuracy(votes, val_labels, top), rel=1e-12)


def test_a_prefix_sets_results_apart(monkeypatch):
    rng = np.random.default_rng(0)
    train, val, labels = unit_rows(rng, 30), unit_rows(rng, 11), rng.integers(0, 3, 30)
    plain = results(monkeypatch, train, labels, val, labels[:11], k=[5])
    named = results(monkeypatch, train, labels, val, labels[:11], k=[5], prefix="cifar10")
    assert named == {f"cifar10_{name}": rate for name, rate in plain.items()}
    evaluator = KNN(dataset(labels), dataset(labels), k=[5], prefix="cifar10", models=["student"])
    assert evaluator.key_metric == "cifar10_student_knn_top1_k5"
    assert evaluator.result_names() == ["cifar10_student_knn_top1_k5", "cifar10_student_knn_top5_k5"]


def test_each_process_votes_for_its_share(monkeypatch):
    """Three processes, played one after the other."""
    rng = np.random.default_rng(0)
    train, val = unit_rows(rng, 60), unit_rows(rng, 11)
    labels, val_labels = rng.integers(0, 3, 60), rng.integers(0, 3, 11)
    expected = results(monkeypatch, train, labels, val, val_labels, k=[5, 20])
    said, voted = [], []
    votes = knn_module._votes
    monkeypatch.setattr(knn_module, "_votes", lambda *args: voted.append(len(args[2])) or votes(*args))
    monkeypatch.setattr(knn_module.distributed, "world_size", lambda: 3)
    monkeypatch.setattr(knn_module.distributed, "gather_objects", lambda value: said.append(value) or said)
    for rank in range(3):
        monkeypatch.setattr(knn_module.distributed, "rank", lambda rank=rank: rank)
        found = results(monkeypatch, train, labels, val, val_labels, k=[5, 20])
    assert found == pytest.approx(expected, rel=1e-12)
    assert voted == [4, 4, 3]


class Pair(Method):
    """Teacher and student that see one half of the columns each."""

    def backbones(self):
        return {"teacher": lambda rows: rows[:, :8], "student": lambda rows: rows[:, 8:]}


class Rows(Samples):
    def __init__(self, features, labels):
        super().__init__(labels, [], 0)
        self.features = features
        self.loaded = 0

    def __len__(self):
        return len(self.features)

    def content(self, index, rng):
        self.loaded += 1
        return {"image": self.features[index]}


def test_teacher_and_student_are_measured_on_one_pass(tmp_path):
    rng = np.random.default_rng(0)
    train, val = (rng.standard_normal((count, 16)).astype(np.float32) for count in (60, 31))
    labels = rng.integers(0, 4, 60), rng.integers(0, 4, 31)
    datasets = [Rows(features, label) for features, label in zip((train, val), labels)]
    pair = Pair()
    evaluator = KNN(*datasets, k=[5, 20], models=["student", "teacher"], batch_size=7)
    assert evaluator.key_metric == "knn_top1_k20"
    found = evaluate(evaluator, pair, tmp_path)
    assert [dataset.loaded for dataset in datasets] == [60, 31]
    for prefix, columns in (("", np.s_[:8]), ("student_", np.s_[8:])):
        one, other = (normalize(paddle.to_tensor(rows[:, columns])).numpy() for rows in (train, val))
        for k, votes in knn_classify(one, labels[0], other, k=[5, 20]).items():
            for top in (1, 5):
                assert found.pop(f"{prefix}knn_top{top}_k{k}") == accuracy(votes, labels[1], top)
    assert not found
    alone = KNN(*datasets, k=[5], models=["student"])
    assert alone.key_metric == "student_knn_top1_k5"
    assert sorted(evaluate(alone, pair, tmp_path)) == ["student_knn_top1_k5", "student_knn_top5_k5"]


def test_memory_does_not_grow_with_test_rows_and_classes(monkeypatch):
    rng = np.random.default_rng(0)
    train, val = unit_rows(rng, 1000), unit_rows(rng, 4000)
    monkeypatch.setattr(knn_module, "_CHUNK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(neighbours, "_MOST_ROWS", 100)
    tracemalloc.start()
    try:
        results(monkeypatch, train, np.arange(1000), val, np.arange(4000) % 1000, k=[10, 20])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    votes = len(val) * 1000 * 8
    assert peak < votes / 8


def test_labels_may_be_large_ids(monkeypatch):
    train = np.eye(4, dtype=np.float32)
    ids = np.array([7, 20250101, 2**62, 20250101])
    found = results(monkeypatch, train, ids, train[:3], np.array([7, 20250101, 8]), k=[1])
    assert found["knn_top1_k1"] == pytest.approx(200 / 3)
    # All three classes are among the five largest, but 8 is not a class of the training images.
    assert found["knn_top5_k1"] == pytest.approx(200 / 3)


def test_features_that_are_not_finite_have_no_score(monkeypatch):
    train, broken = np.eye(3, dtype=np.float32), np.full((3, 3), np.nan, np.float32)
    for features in ((train, broken), (broken, train)):
        with pytest.raises(ValueError, match="3 of 3 .* feature rows are not finite .* weights are probably broken"):
            results(monkeypatch, features[0], np.arange(3), features[1], np.arange(3))


def test_numbered_lists_need_not_hold_the_same_classes(tmp_path):
    for number in range(3):
        Image.new("RGB", (2, 2), (80 * number, 0, 160)).save(tmp_path / f"{number}.png")
    (tmp_path / "train.csv").write_text("path,label\n0.png,0\n1.png,1\n2.png,2\n")
    (tmp_path / "val.csv").write_text("path,label\n0.png,0\n1.png,1\n")
    train, val = (ImageList(list_file=tmp_path / name, transform=ToTensor()) for name in ("train.csv", "val.csv"))
    assert KNN(train, val, k=[1]).run(paddle.nn.Flatten(), tmp_path)["knn_top1_k1"] == 100


@pytest.mark.parametrize(
    ("train", "val", "text"),
    [
        (["a", "b"], ["a", "c"], "only in one of them: b, c"),
        (["a", "b"], ["b", "a"], "their order is not the same"),
        (["a", "b"], [], r"train_dataset has class names \(a, b\) and val_dataset has numbers"),
        ([], ["0", "1", "10"], "val_dataset has class names .* and train_dataset has numbers"),
    ],
)
@pytest.mark.parametrize("evaluator", [KNN, LinearSweep, LogisticRegression])
def test_classes_that_might_not_agree(evaluator, train, val, text):
    with pytest.raises(ValueError, match=text):
        evaluator(dataset([0, 1], train), dataset([0, 1], val))


def test_the_lowest_temperature_has_finite_votes():
    rows = np.eye(3, dtype=np.float32)
    votes = knn_classify(rows, np.array([0, 1, 1]), rows, [3], 0.002)[3]
    assert np.isfinite(votes).all()
    assert votes.argmax(1).tolist() == [0, 1, 1]


def test_classes_that_agree():
    for train, val in ((["a", "b"], ["a", "b"]), (["0", "1"], []), ([], ["0", "1"])):
        KNN(dataset([0, 1], train), dataset([0, 1], val))


WRONG_BATCHES = [
    ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
    ({"num_workers": -1}, r"num_workers \(-1\) must be at least 0"),
]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        *WRONG_BATCHES,
        ({"k": [20, 0]}, r"k \(\[20, 0\]\) must be"),
        ({"k": []}, r"k \(\[\]\) must be"),
        ({"prefix": "a/b"}, r"prefix \('a/b'\) must be letters, digits"),
        ({"models": []}, r"models \(\[\]\) must be one or more of teacher, student"),
        ({"models": ["teachers"]}, r"models \(\['teachers'\]\) must be"),
        ({"temperature": 0}, r"temperature \(0\) must be positive"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be positive"),
        ({"temperature": 0.001}, r"temperature \(0.001\) must be at least 0.002"),
        ({"val_dataset": dataset([0, -1])}, "1 of val_dataset are below"),
    ],
)
def test_knn_refuses_when_built(arguments, text):
    with pytest.raises(ValueError, match=text):
        KNN(**{"train_dataset": dataset([0, 1]), "val_dataset": dataset([0, 1]), **arguments})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [*WRONG_BATCHES, ({"topk": []}, r"topk \(\[\]\) must be"), ({"topk": [1, 0]}, r"topk \(\[1, 0\]\) must be")],
)
def test_classification_refuses_when_built(arguments, text):
    with pytest.raises(ValueError, match=text):
        Classification(dataset([0, 1]), **arguments)
