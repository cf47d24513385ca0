"""Linear probes side by side: the official training step by step, the best as a probe."""

from __future__ import annotations

import json
import logging

import numpy as np
import paddle
import pytest
from PIL import Image

from passl import checkpoint
from passl.data.datasets import ImageFolder
from passl.data.loader import BadSamplesError
from passl.data.transforms import ToTensor
from passl.evaluators import Classification, evaluate
from passl.evaluators.frozen_features import FeatureChoice, extract
from passl.evaluators.linear_heads import LinearHeads, cosine_by_epoch
from passl.models import LinearProbe
from tests.engine import tiny
from tests.evaluators.sweeps import Arrays, sweep, untrained, vit
from tests.models.test_probe import cases, images, recorded_probe
from tests.models.weights import assert_close


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path, size=16)
    return tmp_path


@pytest.fixture
def backbone():
    return untrained()


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
