"""``passl-eval features``: arrays of what a network says of images, and whose rows they are."""

from __future__ import annotations

import csv
import os

import numpy as np
import paddle
import pytest
from PIL import Image

from passl import exported
from passl.cli import eval_main
from passl.evaluators import feature_rows
from passl.models import VisionTransformer, resnet50
from passl.models.tokens import patch_features
from tests.engine import tiny
from tests.engine.test_distributed import launch

NETWORK = ["--arch", "VisionTransformer", "--device", "cpu", "--image_size", "16"]
for argument in ("img_size=16", "patch_size=8", "embed_dim=6", "depth=2", "num_heads=2", "num_register_tokens=1"):
    NETWORK += ["--set", argument]


@pytest.fixture
def images(tmp_path):
    tiny.write_images(tmp_path, size=16)
    return tmp_path


def network(depth=2):
    paddle.seed(0)  # as Global.seed
    model = VisionTransformer(16, 8, embed_dim=6, depth=depth, num_heads=2, num_register_tokens=1)
    model.eval()
    return model


def features(*arguments):
    eval_main(["features", *NETWORK, *map(str, arguments)])


def index_of(folder):
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def inputs(paths):
    transform = exported.transform(exported.standard_preprocessing(16, 16))
    return paddle.to_tensor(np.stack([transform(Image.open(path)) for path in paths]))


def refused(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        features(*arguments)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return stopped.value.code, error


@pytest.mark.smoke
@pytest.mark.parametrize("layer", [-1, 0])
def test_all_kinds_of_class_folders(images, layer):
    out = images / "out"
    (images / "train/class1/2.png").write_bytes(b"?")
    features(
        "--images", images / "train", "--out", out, "--what", "cls,patch,mean", "--layer", layer, "--batch_size", 4
    )
    assert sorted(path.name for path in out.iterdir()) == ["cls.npy", "index.csv", "mean.npy", "patch.npy"]
    rows = index_of(out)
    assert rows[7] == {"path": "class1/3.png", "label": "1", "class": "class1", "row": "7"}
    assert len(rows) == 14
    assert "class1/2.png" not in {row["path"] for row in rows}
    batch, model = inputs([images / "train" / row["path"] for row in rows]), network()
    model.blocks = model.blocks[: layer % 2 + 1]
    with paddle.no_grad():
        expected = {"cls": model(batch), "patch": patch_features(model, batch)}
    expected["mean"] = expected["patch"].mean(axis=[1, 2])
    for kind, values in expected.items():
        found = np.load(out / f"{kind}.npy", mmap_mode="r")
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_allclose(found, values.numpy(), atol=1e-5)
    assert expected["patch"].shape == [14, 2, 2, 6]


@pytest.mark.smoke
def test_half_precision_of_files_and_a_list(images):
    paths = [images / "val/class0/1.png", images / "val/class2/0.png"]
    features("--images", *paths, "--out", images / "files", "--dtype", "float16")
    (images / "list.csv").write_text("path,label\nval/class0/1.png,cat\nval/class2/0.png,dog\n")
    features("--images", images / "list.csv", "--out", images / "list")
    half, whole = (np.load(images / name / "cls.npy") for name in ("files", "list"))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, whole.astype(np.float16))
    assert [row["class"] for row in index_of(images / "list")] == ["cat", "dog"]
    assert list(index_of(images / "files")[0]) == ["path", "row"]


def test_a_run_that_fails_leaves_what_was_there(images, capfd, monkeypatch):
    out = images / "out"
    features("--images", images / "val", "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "cls.npy.7.partial").write_bytes(b"left by a killed run")
    with monkeypatch.context() as patched:
        nothing = lambda *arguments: {"cls": paddle.full([3, 6], float("nan"))}  # noqa: E731
        patched.setattr(feature_rows, "image_features", nothing)
        code, error = refused(capfd, "--images", images / "train", "--out", out, "--batch_size", 3)
    assert code == 1
    assert "error: features: features are not finite: the weights are damaged, or of another network" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (["--what", "cls,patches"], 2, "'cls,patches' must be one or more of cls,patch,mean, each once"),
        (["--layer", 2], 1, "layer (2) must be from -2 to 1: there are 2 blocks"),
        (["--layer", 2, "--what", "patch"], 1, "layer (2) must be from -2 to 1: there are 2 blocks"),
        (["--images", "nowhere"], 2, "--images: nowhere: no such file or folder"),
        (["--images", "empty"], 2, "--images: "),
        (["--images", "broken"], 1, "all image files cannot be read"),
        (["--image_size", "20"], 1, "20"),
        (["--batch_size", "0"], 2, "'0' must be a whole number from 1"),
    ],
)
def test_errors(images, capfd, monkeypatch, change, code, text):
    monkeypatch.chdir(images)
    (images / "empty").mkdir()
    (images / "broken").mkdir()
    for number in range(3):
        (images / f"broken/{number}.png").write_bytes(b"?")
    given = ["--images", "val", "--out", "out"]
    found, error = refused(capfd, *given, *change)
    assert (found, text in error) == (code, True), error
    assert not (images / "out/cls.npy").exists()


def test_a_second_run_into_one_folder(images, capfd):
    out = images / "out"
    features("--images", images / "val", "--out", out, "--what", "cls,patch")
    (out / "patch.npy.3.partial").write_bytes(b"left by a killed run")
    features("--images", images / "val", "--out", out, "--what", "mean")
    assert sorted(path.name for path in out.iterdir()) == ["cls.npy", "index.csv", "mean.npy", "patch.npy"]
    features("--images", images / "train", "--out", out, "--what", "cls")
    assert sorted(path.name for path in out.iterdir()) == ["cls.npy", "index.csv"]
    assert "patch.npy is removed: it has the rows of other images" in capfd.readouterr().err
    assert len(np.load(out / "cls.npy")) == len(index_of(out)) == 15


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_images(images, count):
    paths = sorted((images / "val").rglob("*.png"))[:count]
    features("--images", *paths, "--out", images / "out", "--what", "mean")
    assert np.load(images / "out/mean.npy").shape == (count, 6)


def test_a_convolutional_network():
    model = resnet50()
    model.eval()
    batch = paddle.randn([1, 3, 64, 64])
    with paddle.no_grad():
        found = feature_rows.image_features(model, batch, ["cls", "patch", "mean"])
    assert found["patch"].shape == [1, 2, 2, 2048]
    np.testing.assert_allclose(found["mean"].numpy(), found["cls"].numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"layer \(0\) must be -1"):
        feature_rows.image_features(model, batch, ["cls"], 0)


def test_names_that_are_no_text(images):
    os.link(images / "val/class0/0.png", os.fsencode(images) + b"/val/class0/caf\xe9.png")
    features("--images", images / "val", "--out", images / "out")
    assert [row["path"] for row in index_of(images / "out")][3] == "class0/caf\\udce9.png"


@pytest.mark.slow
def test_two_processes_write_what_one_does(images):
    (images / "val/class1/1.png").write_bytes(b"?")
    kinds = ["--what", "cls,patch", "--batch_size", "2"]
    features("--images", images / "val", "--out", images / "one", *kinds)
    arguments = ["features", "--images", images / "val", "--out", images / "more", *kinds, *NETWORK]
    done = launch(images, tiny.ROOT / "tools/eval.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (images / "more").iterdir()) == ["cls.npy", "index.csv", "patch.npy"]
    assert index_of(images / "more") == index_of(images / "one")
    for kind in ("cls", "patch"):
        one, more = (np.load(images / name / f"{kind}.npy") for name in ("one", "more"))
        np.testing.assert_allclose(one, more, atol=1e-6)
