"""The evaluator Classification: what it reports, and what it says of few, bad and wrongly labelled images."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.data.datasets import ImageFolder
from passl.data.loader import BadSamplesError
from passl.data.transforms import ToTensor
from passl.evaluators import Classification, evaluate

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


class Brightest(paddle.nn.Layer):
    """Takes an image for the class of its brightest channel."""

    num_classes = 3

    def predict(self, images):
        return 5 * images.mean([2, 3])


@pytest.fixture
def folder(tmp_path):
    """Three pictures each of red, green and blue; of the red ones one is in fact green."""
    for label, name in enumerate(("a", "b", "c")):
        for number in range(3):
            colour = COLOURS[1] if (label, number) == (0, 2) else COLOURS[label]
            write(tmp_path / "data" / name / f"{number}.png", colour)
    return tmp_path


def write(path: Path, colour) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


def measured(folder, out=None, **arguments):
    return evaluate(Classification(ImageFolder(folder / "data", ToTensor()), **arguments), Brightest(), out or folder)


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.smoke
def test_report(folder, caplog):
    plain = measured(folder)
    assert set(plain) == {"top1", "top5", "loss"}
    assert not list(folder.glob("*.*")), "nothing is written that nobody asked for"
    with caplog.at_level(logging.INFO, "passl"):
        result = measured(folder, folder / "out", report=True, predictions="predictions.csv", topk=[1, 2])
    assert result["top1"] == pytest.approx(100 * 8 / 9) == plain["top1"]
    assert result["balanced_accuracy"] == pytest.approx((200 / 3 + 100 + 100) / 3)
    # a: two of three above the six others, the third equal with them; b: all equal with one of six others, and so on.
    assert result["auc"] == pytest.approx(np.mean([(2 * 6 + 6 * 0.5) / 18, (3 * 5 + 3 * 0.5) / 18, 1.0]))
    assert "least often right: a 66.7 % of 3, b 100.0 % of 3" in caplog.text
    classes = rows(folder / "out/per_class.csv")
    assert [row["class"] for row in classes] == ["a", "b", "c"]
    assert [float(row["accuracy"]) for row in classes] == pytest.approx([66.6667, 100, 100])
    assert [float(row["precision"]) for row in classes] == pytest.approx([100, 75, 100])
    confusion = (folder / "out/confusion.csv").read_text().splitlines()
    assert confusion == ["true class,a,b,c", "a,2,1,0", "b,0,3,0", "c,0,0,3"]
    assert Image.open(folder / "out/confusion.png").size > (300, 300)
    predictions = rows(folder / "out/predictions.csv")
    assert predictions[2] == {**predictions[2], "path": "a/2.png", "class": "a", "predicted": "b", "right": "0"}
    assert float(predictions[2]["probability"]) == pytest.approx(np.exp(5) / (np.exp(5) + 2), abs=1e-5)


@pytest.mark.parametrize("counts", [(1, 0), (2, 0), (1, 1)])
def test_few_images_and_one_class(tmp_path, counts):
    for label, count in enumerate(counts):
        for number in range(count):
            write(tmp_path / "data" / "ab"[label] / f"{number}.png", COLOURS[label])
    result = measured(tmp_path, report=True)
    assert result["top1"] == result["balanced_accuracy"] == 100
    assert ("auc" in result) == (counts[1] > 0), "one class has no AUC"
    assert all(np.isfinite(value) for value in result.values())
    assert len(rows(tmp_path / "per_class.csv")) == 3, "the model has three classes"


def test_no_images(tmp_path):
    (tmp_path / "data/a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images in the class folder"):
        measured(tmp_path)


def test_bad_files(folder):
    clean = measured(folder, report=True)
    (folder / "data/a/bad.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    assert measured(folder, report=True, predictions="p.csv") == clean
    assert "bad.jpg" not in (folder / "p.csv").read_text()
    for path in (folder / "data").rglob("*.*"):
        path.write_bytes(b"nothing")
    with pytest.raises(BadSamplesError, match="cannot be read"):
        measured(folder)


def test_labels_of_more_classes_than_the_model_has(folder):
    write(folder / "data/d/0.png", COLOURS[0])
    with pytest.raises(ValueError, match="labels must be in 0 to 2, the classes of the model, and are from 0 to 3"):
        measured(folder, report=True)


@pytest.mark.parametrize("name", ["", "a/b.csv"])
def test_wrong_arguments(folder, name):
    with pytest.raises(ValueError, match="predictions .* must be the name of a file"):
        measured(folder, predictions=name)


def test_logits_that_are_not_numbers_are_wrong(folder, caplog):
    class Broken(Brightest):
        def predict(self, images):
            return float("nan") * images.mean([2, 3])

    dataset = ImageFolder(folder / "data", ToTensor())
    with caplog.at_level(logging.WARNING, "passl"):
        result = evaluate(Classification(dataset, report=True), Broken(), folder)
    assert result["top1"] == result["top5"] == 0
    assert "the logits of 9 of 9 images are not numbers: none of these is right" in caplog.text
