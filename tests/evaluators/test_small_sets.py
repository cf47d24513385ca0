"""Evaluators on no image, one, two, one class, files that cannot be read: a clear error or the right answer, through
the real command.
"""

from __future__ import annotations

import csv
import json

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.cli import eval_main, train_main
from passl.data.datasets import ImageFolder
from passl.data.transforms import ToTensor
from passl.evaluators import Classification, evaluate
from tests.engine import tiny

pytestmark = pytest.mark.smoke

GLOBAL = "Global: {{output_dir: {folder}/out, device: cpu, name: run}}\n"
BACKBONE = "Model: {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 6, depth: 1, num_heads: 2}}\n"
TRANSFORM = "[ToTensor: {{}}, Normalize: {{}}]"
CONFIGS = {
    "KNN": GLOBAL + BACKBONE + "Evaluators:\n"
    f"""  - name: KNN
    k: [1, 20]
    train_dataset: {{{{name: ImageFolder, root: {{folder}}/train, transform: {TRANSFORM}}}}}
    val_dataset: {{{{name: ImageFolder, root: {{folder}}/val, transform: {TRANSFORM}}}}}
""",
    "Features": GLOBAL + BACKBONE + "Evaluators:\n"
    f"""  - name: Features
    what: [cls, patch]
    dataset: {{{{name: ImageFolder, root: {{folder}}/val, transform: {TRANSFORM}}}}}
""",
    "RegionExtraction": GLOBAL + BACKBONE + "Evaluators:\n"
    """  - name: RegionExtraction
    patch_size: 8
    dataset: {{name: ImageFolder, root: {folder}/val}}
""",
}


def write(folder, split, classes):
    """classes: name -> for each file whether it is an image."""
    rng = np.random.default_rng(0)
    (folder / split).mkdir()
    for name, files in classes.items():
        (folder / split / name).mkdir()
        for number, is_image in enumerate(files):
            path = folder / split / name / f"{number}.png"
            if is_image:
                Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(path)
            else:
                path.write_bytes(b"?")


def measure(folder, name, val, train=None, **overrides):
    """The numbers of an evaluator on class folders."""
    write(folder, "val", val)
    write(folder, "train", val if train is None else train)
    config = tiny.write_config(folder, CONFIGS[name], "config.yaml")
    eval_main(["-c", str(config), *tiny.overrides(**overrides)])
    return json.loads((folder / "out/run/eval.json").read_text())


def refused(capfd, *arguments, code, **named):
    """The error's text."""
    with pytest.raises(SystemExit) as stopped:
        measure(*arguments, **named)
    assert stopped.value.code == code
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]


GOOD = {
    "one image": {"a": [1]},
    "two images": {"a": [1], "b": [1]},
    "one class": {"a": [1, 1, 1]},
    "one corrupt": {"a": [1, 0, 1], "b": [1, 1]},
    "a corrupt class": {"a": [1, 1], "b": [0]},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", GOOD)
def test_numbers(tmp_path, name, case, capfd):
    classes = GOOD[case]
    readable = sum(map(sum, classes.values()))
    results = measure(tmp_path, name, classes)
    log = (tmp_path / "out/run/eval.log").read_text()
    bad = [f"{label}/{i}.png" for label, files in classes.items() for i, is_image in enumerate(files) if not is_image]
    assert all(f"/val/{path}" in log for path in bad)
    assert (", 0 left out" not in log and "left out" in log) == bool(bad)
    if name == "KNN":  # the validation images are among the training images
        assert results["knn_top1_k1"] == results["knn_top5_k20"] == 100.0
        assert f"only {readable} training images: a larger k uses them all" in log
    elif name == "Features":
        assert results == {"features_rows": readable, "features_width": 6}
        assert np.load(tmp_path / "out/run/features.patch.npy").shape == (readable, 2, 2, 6)
        with (tmp_path / "out/run/features.csv").open(newline="") as file:
            assert not {row["path"] for row in csv.DictReader(file)} & set(bad)
    else:
        assert results["regions"] == readable
        assert results["regions_left_out"] == len(bad)


WRONG = {
    "no image": ({}, 2, "contains no class folders"),
    "an empty class": ({"a": [1], "b": []}, 2, "no images in the class folder(s) b"),
    "all corrupt": ({"a": [0], "b": [0, 0]}, 1, "val/a/0.png"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", WRONG)
def test_errors(tmp_path, name, case, capfd):
    classes, code, text = WRONG[case]
    error = refused(capfd, tmp_path, name, classes, code=code, train={"a": [1], "b": [1, 1]} if code == 1 else None)
    assert text in error


def test_images_without_labels(tmp_path, capfd):
    change = {"Evaluators__0__val_dataset": f"{{name: ImageList, root: {tmp_path}/val}}"}
    error = refused(capfd, tmp_path, "KNN", {"a": [1]}, code=2, **change)
    assert "val_dataset has no labels: use class folders (ImageFolder) or a csv (ImageList)" in error


def test_sizes_that_differ(tmp_path, capfd):
    write(tmp_path, "val", {"a": [1, 1]})
    write(tmp_path, "train", {"a": [1]})
    Image.new("RGB", (24, 16)).save(tmp_path / "val/a/1.png")
    config = tiny.write_config(tmp_path, CONFIGS["Features"], "config.yaml")
    for size in (1, 2):
        with pytest.raises(SystemExit) as stopped:
            eval_main(["-c", str(config), "-o", f"Evaluators.0.batch_size={size}"])
        assert stopped.value.code == 1
        assert "give the data" in capfd.readouterr().err.replace("dataset", "data set")
        assert [path.name for path in (tmp_path / "out/run").iterdir()] == ["eval.log"]


def test_two_evaluators_with_one_name(tmp_path, capfd):
    both = CONFIGS["KNN"] + CONFIGS["KNN"].split("Evaluators:\n")[1].replace("[1, 20]", "[20]")
    write(tmp_path, "val", {"a": [1]})
    write(tmp_path, "train", {"a": [1]})
    config = tiny.write_config(tmp_path, both, "config.yaml")
    with pytest.raises(SystemExit) as stopped:
        eval_main(["-c", str(config)])
    assert stopped.value.code == 2
    assert (
        "Evaluators.1: KNN gives 'knn_top1_k20', as Evaluators.0 does, and one of the two would be lost: give one "
        "another prefix, -o Evaluators.1.prefix=NAME"
    ) in capfd.readouterr().err
    eval_main(["-c", str(config), "-o", "Evaluators.1.prefix=cifar"])
    results = json.loads((tmp_path / "out/run/eval.json").read_text())
    assert sorted(results) == [
        "cifar_knn_top1_k20", "cifar_knn_top5_k20", "knn_top1_k1", "knn_top1_k20", "knn_top5_k1", "knn_top5_k20",
    ]  # fmt: skip


# --- a probe, and training ---


class Predictor(paddle.nn.Layer):
    """The brightest channel is the class."""

    def predict(self, images):
        return images.mean(axis=[2, 3])


@pytest.mark.parametrize("classes", [{"a": [1]}, {"a": [1], "b": [1]}, {"a": [1, 1, 1]}, {"a": [1, 0], "b": [1]}])
def test_accuracy_of_few_images(tmp_path, classes):
    write(tmp_path, "val", classes)
    dataset = ImageFolder(tmp_path / "val", ToTensor())
    results = evaluate(Classification(dataset, batch_size=2), Predictor(), tmp_path)
    numbers = [i for i in range(len(dataset)) if is_readable(dataset.paths[i])]
    channels = [dataset.sample(i, None)["image"].mean((1, 2)).argmax() for i in numbers]
    assert results["top1"] == pytest.approx(100 * np.mean(np.equal(channels, dataset.labels[numbers])))
    assert results["top5"] == 100.0
    assert np.isfinite(results["loss"])


def is_readable(path):
    with open(path, "rb") as file:
        return file.read(1) != b"?"


def test_an_evaluator_that_fails_ends_training_with_its_reason(tmp_path, capfd):
    tiny.write_images(tmp_path, size=16)
    Image.new("RGB", (24, 16)).save(tmp_path / "val/class1/1.png")
    config = tiny.write_config(tmp_path, tiny.PROBE, "probe.yaml")
    plain = "Evaluators.0.val_dataset.transform=[ToTensor: {}, Normalize: {}]"
    with pytest.raises(SystemExit) as stopped:
        train_main(["-c", str(config), "-o", plain, *tiny.overrides(Global__epochs=1)])
    assert stopped.value.code == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "error: KNN: 'image' differs in shape between samples of a batch" in error
    assert (tmp_path / "out/LinearProbe/latest.pdparams").exists() or list((tmp_path / "out/LinearProbe").glob("*.pd*"))
