"""Linear probes side by side: the official training step by step, the best as a probe, and features kept on disk."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import paddle
import pytest
from PIL import Image

from passl import checkpoint
from passl.data.datasets import ImageFolder
from passl.data.loader import BadSamplesError
from passl.data.samples import Samples
from passl.data.transforms import Compose, RandomHorizontalFlip, ToTensor
from passl.evaluators import Classification, LinearSweep, evaluate
from passl.evaluators import frozen_features as frozen
from passl.evaluators.frozen_features import FeatureChoice, FrozenFeatures, extract
from passl.evaluators.linear_heads import LinearHeads, cosine_by_epoch
from passl.models import LinearProbe, VisionTransformer
from tests.engine import tiny
from tests.models.test_probe import cases, images, recorded_probe
from tests.models.weights import assert_close


def vit() -> VisionTransformer:
    return VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=2)


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path, size=16)
    return tmp_path


def sweep(folder, transform=None, **arguments) -> LinearSweep:
    sets = [ImageFolder(folder / split, transform or ToTensor()) for split in ("train", "val")]
    small = {"n_last_blocks": [1, 3], "learning_rates": [0.01, 1.0], "epochs": 4, "train_batch_size": 4}
    return LinearSweep(*sets, **{**small, **arguments})


@pytest.fixture
def backbone():
    paddle.seed(0)
    network = vit()
    network.eval()
    return network


# --- the official training ---


@pytest.mark.smoke
def test_recorded_training(reference):
    """Losses of all steps, final weights and rates of the official run; beside it, others with other rates."""
    recorded = np.load(reference / "linear.npz")
    for case in cases(recorded):
        part = {key: recorded[f"{case}/{key}"] for key in ("order", "lr_per_step", "loss_per_step", "train_features")}
        size, first = int(recorded[f"{case}/batch_size"]), float(part["lr_per_step"][0])
        start = recorded[f"{case}/init_weight"].T, recorded[f"{case}/init_bias"]
        heads = LinearHeads([first / 2, first, 2 * first], [0, 0, 0], *start)
        losses, scores = [], []
        for order, factor in zip(part["order"], cosine_by_epoch(len(part["order"]))):
            for rows in np.split(order, range(size, len(order), size)):
                assert first * factor == pytest.approx(part["lr_per_step"][len(losses)], rel=1e-6)
                labels = recorded["train_labels"][rows]
                losses.append(heads.step(part["train_features"][rows], labels, factor)[1].item())
            rates, loss = heads.rates(recorded[f"{case}/val_features"], recorded["val_labels"], (1, 5))
            scores.append([loss[1], *rates[1]])
        assert_close(losses, part["loss_per_step"], 1e-4, f"{case} loss")
        weight, bias = heads.head(1)
        assert_close(weight.T, recorded[f"{case}/final_weight"], 1e-4, f"{case} weight")
        assert_close(bias, recorded[f"{case}/final_bias"], 1e-4, f"{case} bias")
        expected = recorded[f"{case}/val_loss_acc1_acc5_per_epoch"]
        for column in range(3):
            known = ~np.isnan(expected[:, column])
            np.testing.assert_allclose(np.array(scores)[known, column], expected[known, column], rtol=0, atol=1e-4)


def test_recorded_features_from_one_pass(reference):
    """Those of each recorded choice, out of the features for all choices."""
    recorded = np.load(reference / "linear.npz")
    for case in cases(recorded):
        probe = recorded_probe(reference, case, recorded)
        own = FeatureChoice(probe.n_last_blocks, probe.avgpool)
        both = [own, FeatureChoice(len(probe.backbone.blocks), True)]
        probe.backbone.eval()
        dataset = Arrays(images(recorded["val_images_u8"]).numpy(), recorded["val_labels"])
        with paddle.no_grad():
            found = extract(probe.backbone, dataset, both, case)
        assert_close(found.of(own), recorded[f"{case}/val_features"], 2e-5, case)


class Arrays(Samples):
    def __init__(self, arrays, labels):
        super().__init__(labels, [], 10)
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays)

    def describe(self, index):
        return str(index)

    def content(self, index, rng):
        return {"image": self.arrays[index]}


def test_heads_do_not_know_of_each_other():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((12, 5)).astype(np.float32), rng.integers(0, 3, 12)
    start = 0.1 * rng.standard_normal((5, 3)), np.zeros(3)
    pairs = [(0.1, 0.0), (1e6, 0.0), (0.5, 0.1)]  # the second diverges
    together = LinearHeads([rate for rate, _ in pairs], [decay for _, decay in pairs], *start)
    alone = [LinearHeads([rate], [decay], *start) for rate, decay in pairs]
    for heads in (together, *alone):
        for factor in (1.0, 0.5, 0.25):
            heads.step(x, labels, factor)
    for number in (0, 2):
        assert_close(together.head(number)[0], alone[number].head(0)[0], 1e-6)
        assert_close(together.rates(x, labels, (1,))[0][number], alone[number].rates(x, labels, (1,))[0][0], 1e-6)


def test_weight_decay_is_sgds():
    """Against Paddle's momentum with the decay added to the weights' gradient."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((8, 4)).astype(np.float32), rng.integers(0, 3, 8)
    layer = paddle.nn.Linear(4, 3)
    heads = LinearHeads([0.3], [0.1], layer.weight.numpy(), layer.bias.numpy())
    velocity = [0, 0]
    for _ in range(5):
        heads.step(x, labels)
        loss = paddle.nn.functional.cross_entropy(layer(paddle.to_tensor(x)), paddle.to_tensor(labels))
        grads = paddle.grad(loss, [layer.weight, layer.bias])
        for number, (parameter, grad) in enumerate(zip((layer.weight, layer.bias), grads)):
            velocity[number] = 0.9 * velocity[number] + grad.numpy() + (0.1 * parameter.numpy() if number == 0 else 0)
            parameter.set_value(parameter.numpy() - 0.3 * velocity[number])
    assert_close(heads.head(0)[0], layer.weight.numpy(), 1e-5)
    assert_close(heads.head(0)[1], layer.bias.numpy(), 1e-5)


# --- the evaluator ---


@pytest.mark.smoke
def test_table_and_the_best_as_a_probe(folder, backbone, caplog):
    with caplog.at_level(logging.INFO, "passl"):
        result = evaluate(sweep(folder, weight_decays=[0, 1e-4]), backbone, folder / "out")
    table = json.loads((folder / "out/linear.json").read_text())
    assert len(table["rows"]) == 2 * 2 * 2 * 2
    assert {row["features"] for row in table["rows"]} == {"n1", "n1_avgpool", "n3", "n3_avgpool"}
    best = max(table["rows"], key=lambda row: (row["top1"], -row["loss"]))
    assert table["best"] == best
    assert result["linear_top1"] == best["top1"]
    assert result["linear_loss"] == best["loss"]
    for name in ("n1", "n3_avgpool"):
        assert result[f"linear_top1_{name}"] == max(r["top1"] for r in table["rows"] if r["features"] == name)
    assert len((folder / "out/linear.csv").read_text().splitlines()) == 17
    target = folder / "out/linear_best.pdparams"
    assert (
        f"Global.pretrained_model={target} -o Model.num_classes=3 -o Model.n_last_blocks={best['n_last_blocks']}"
        in (caplog.text)
    )
    probe = LinearProbe(vit, 3, best["n_last_blocks"], best["avgpool"])
    checkpoint.load_weights(probe, checkpoint.read_weights(target))
    scored = evaluate(Classification(ImageFolder(folder / "val", ToTensor())), probe, folder)
    assert scored["top1"] == pytest.approx(best["top1"])
    assert scored["loss"] == pytest.approx(best["loss"], abs=1e-5)


def test_a_name_of_its_own(folder, backbone):
    """Two in one configuration would have the same results otherwise."""
    second = sweep(folder, file="second", n_last_blocks=1, avgpool=False)
    assert second.result_names() == [second.key_metric] == ["second_top1"]
    assert set(evaluate(second, backbone, folder)) == {"second_top1", "second_top5", "second_loss", "second_top1_n1"}
    assert (folder / "second_best.pdparams").exists()


def test_the_same_twice(folder, backbone):
    found = [evaluate(sweep(folder), backbone, folder / name) for name in ("a", "b")]
    assert found[0] == found[1]
    files = [(folder / name / "linear_best.pdparams").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_a_convnet_has_one_choice(folder):
    class Pooled(paddle.nn.Layer):
        def forward(self, x):
            return x.mean([2, 3])

    result = evaluate(sweep(folder, epochs=30), Pooled(), folder)
    assert set(result) == {"linear_top1", "linear_top5", "linear_loss", "linear_top1_output"}


def test_all_diverged(folder, backbone):
    with pytest.raises(ValueError, match="every classifier diverged: give lower learning_rates"):
        evaluate(sweep(folder, learning_rates=[3e38], epochs=9, train_batch_size=256), backbone, folder)
    result = evaluate(sweep(folder, learning_rates=[3e38, 0.1], epochs=9, train_batch_size=256), backbone, folder)
    assert np.isfinite(result["linear_loss"])
    rows = json.loads((folder / "linear.json").read_text())["rows"]
    assert {row["loss"] for row in rows if row["learning_rate"] > 1} == {None}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"learning_rates": []}, r"learning_rates \(\[\]\) must be one or more numbers above 0"),
        ({"learning_rates": [0.1, 0]}, r"learning_rates \(\[0.1, 0\]\) must be"),
        ({"weight_decays": [-1]}, r"weight_decays \(\[-1\]\) must be one or more numbers from 0"),
        ({"n_last_blocks": [0]}, r"n_last_blocks \(\[0\]\) and avgpool .* must be one or more choices"),
        ({"epochs": 0}, r"epochs \(0\) must be at least 1"),
        ({"momentum": 1.0}, r"momentum \(1.0\) must be at least 0 and below 1"),
        ({"file": "a/b"}, r"file \('a/b'\) must be a name"),
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
    ],
)
def test_wrong_arguments(folder, arguments, text):
    with pytest.raises(ValueError, match=text):
        sweep(folder, **arguments)


def test_more_blocks_than_there_are(folder, backbone):
    with pytest.raises(ValueError, match=r"n_last_blocks \(4\) must be between 1 and .* \(3\)"):
        evaluate(sweep(folder, n_last_blocks=[1, 4]), backbone, folder)


def test_other_classes(folder):
    (folder / "val/class2").rename(folder / "val/class3")
    with pytest.raises(ValueError, match="labels would not agree; only in one of them: class2, class3"):
        sweep(folder)


# --- few and bad images ---


def write(folder, **counts):
    """`train_a=2`: two images of class a for training."""
    for name, count in counts.items():
        target = folder / name.replace("_", "/")
        target.mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 16), (40 * number, 90, 0)).save(target / f"{number}.png")


@pytest.mark.parametrize(
    "counts",
    [{"train_a": 1, "val_a": 1}, {"train_a": 1, "train_b": 1, "val_a": 1, "val_b": 1}, {"train_a": 2, "val_a": 2}],
)
def test_few_images_and_one_class(tmp_path, backbone, counts):
    write(tmp_path, **counts)
    result = evaluate(sweep(tmp_path), backbone, tmp_path)
    assert all(np.isfinite(value) for value in result.values())
    if len(counts) == 2:
        assert result["linear_top1"] == 100


def test_no_images(tmp_path):
    write(tmp_path, train_a=0, val_a=1)
    with pytest.raises(FileNotFoundError, match="no images in the class folder"):
        sweep(tmp_path)


def test_bad_files(folder, backbone):
    """One among good ones is left out; where all are bad, that is an error that names them."""
    clean = evaluate(sweep(folder), backbone, folder)
    (folder / "train/class0/bad.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    assert evaluate(sweep(folder, cache=True), backbone, folder) == clean
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(BadSamplesError, match="cannot be read"):
        evaluate(sweep(folder), backbone, folder)


def test_weights_that_are_not_finite(folder, backbone):
    backbone.norm.weight.set_value(backbone.norm.weight * float("nan"))
    with pytest.raises(ValueError, match="15 of 15 feature rows are not finite: the weights are probably broken"):
        evaluate(sweep(folder), backbone, folder)


# --- features on disk ---


@pytest.fixture
def counted(monkeypatch):
    """How often a data set went through the backbone."""
    calls = []
    original = frozen.map_dataset
    monkeypatch.setattr(frozen, "map_dataset", lambda *args, **kw: calls.append(args[3]) or original(*args, **kw))
    return calls


@pytest.mark.smoke
def test_a_second_probe_does_not_see_the_images(folder, backbone, counted):
    first = evaluate(sweep(folder, cache=True), backbone, folder)
    assert len(counted) == 2
    assert len(list((folder / "feature_cache").iterdir())) == 2
    assert evaluate(sweep(folder, cache=str(folder / "feature_cache")), backbone, folder / "other") == first
    fewer = evaluate(sweep(folder, cache=True, n_last_blocks=1, avgpool=False), backbone, folder)
    assert len(counted) == 2
    assert fewer["linear_top1_n1"] == first["linear_top1_n1"]
    evaluate(sweep(folder, cache=True, n_last_blocks=2, avgpool=False), backbone, folder)
    assert len(counted) == 2
    evaluate(sweep(folder), backbone, folder)
    assert len(counted) == 4, "only where asked"


def test_what_makes_features_stale(folder, backbone, counted):
    cache = str(folder / "cache")
    evaluate(sweep(folder, cache=cache), backbone, folder)

    def computed(network=backbone, **arguments) -> int:
        counted.clear()
        evaluate(sweep(folder, cache=cache, **arguments), network, folder)
        return len(counted)

    assert computed() == 0
    assert computed(transform=Compose([ToTensor(), ToTensorTwice()])) == 2
    assert computed(transform=Compose([ToTensor(), ToTensorTwice(3)])) == 2
    assert computed(transform=Compose([ToTensor(), ToTensorTwice(4).__call__])) == 2
    assert computed(transform=Compose([ToTensor(), ToTensorTwice(5).__call__])) == 2, "a method is its object's"
    other = VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=3)  # the same weights in other heads
    other.set_state_dict(backbone.state_dict())
    other.eval()
    assert computed(other) == 2
    image = folder / "val/class0/0.png"
    os.utime(image, ns=(1, 1))
    assert computed() == 1
    (folder / "val/class0/0.png").rename(folder / "val/class0/00.png")
    assert computed() == 1
    backbone.norm.bias.set_value(backbone.norm.bias + 1e-6)
    assert computed() == 2
    assert computed() == 0


class ToTensorTwice:
    def __init__(self, factor=2):
        self.factor = factor

    def __call__(self, array, rng=None):
        return array * self.factor


def test_random_transforms_and_samples_without_files_are_not_kept(folder, backbone, counted, caplog):
    transform = Compose([RandomHorizontalFlip(), ToTensor()])
    with caplog.at_level(logging.INFO, "passl"):
        evaluate(sweep(folder, transform=transform, cache=True), backbone, folder)
    assert "the transform is random, so features are not kept" in caplog.text
    assert not (folder / "feature_cache").exists()
    arrays = Arrays(np.zeros((3, 3, 16, 16), np.float32), [0, 1, 2])
    evaluate(LinearSweep(arrays, arrays, n_last_blocks=1, epochs=1, cache=True), backbone, folder)
    assert "features are not kept: the samples of Arrays are no files" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "pickle", "other"])
def test_damaged_files_are_computed_anew(folder, backbone, counted, caplog, damage):
    first = evaluate(sweep(folder, cache=True), backbone, folder)
    for path in (folder / "feature_cache").iterdir():
        content = bytearray(path.read_bytes())
        if damage == "cut":
            content = content[: len(content) // 2]
        elif damage == "bit":
            content[len(content) // 3] ^= 1
        elif damage == "text":
            content = b"features"
        if damage in ("cut", "bit", "text"):
            path.write_bytes(content)
        else:
            rows = np.array([{}], object) if damage == "pickle" else np.zeros(3, np.float32)
            with path.open("wb") as file:
                np.savez(file, rows=rows, labels=np.zeros(3))
    counted.clear()
    assert evaluate(sweep(folder, cache=True), backbone, folder) == first
    assert len(counted) == 2
    assert caplog.text.count("computed anew") == 2
    counted.clear()
    assert evaluate(sweep(folder, cache=True), backbone, folder) == first
    assert not counted


def test_the_key_is_that_of_another_process(folder, backbone):
    """Layers are numbered by process, and a forward leaves its marks on them."""
    checkpoint.write(dict(backbone.state_dict()), folder / "w.pdparams")
    code = f"""
import paddle
from passl import checkpoint
from passl.data.datasets import ImageFolder
from passl.data.transforms import ToTensor
from passl.evaluators import fingerprint
from passl.models import VisionTransformer
for _ in range(2):
    network = VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=2)
checkpoint.load_weights(network, checkpoint.read_weights({str(folder / "w")!r}))
print(fingerprint.of_network(network), fingerprint.of_data(ImageFolder({str(folder / "val")!r}, ToTensor())))
network(paddle.zeros([1, 3, 16, 16]))
network.eval()
print(fingerprint.of_network(network))
"""
    done = tiny.run(code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.split()[0] == second
    dataset = ImageFolder(folder / "val", ToTensor())
    assert first.split() == [frozen.fingerprint.of_network(backbone), frozen.fingerprint.of_data(dataset)]


def test_settings_in_lists_are_the_networks():
    keys = []
    for stride in (1, 2):
        paddle.seed(0)
        keys.append(frozen.fingerprint.of_network(paddle.nn.Conv2D(3, 4, 3, stride=stride)))
    assert keys[0] != keys[1]


def test_columns_of_a_probe():
    rows = np.arange(2 * 12, dtype=np.float32).reshape(2, 12)  # three blocks and a mean, 3 wide each
    found = FrozenFeatures(rows, np.zeros(2, int), 3, True)
    assert found.of(FeatureChoice(2, False))[0].tolist() == [3, 4, 5, 6, 7, 8]
    assert found.of(FeatureChoice(2, True))[0].tolist() == [3, 4, 5, 6, 9, 7, 10, 8, 11]
