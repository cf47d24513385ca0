"""The features of a data set as files, for images and for regions."""

from __future__ import annotations

import csv
import json
import tracemalloc

import numpy as np
import paddle
import pytest

from passl.data.datasets import ImageFolder, ImageList
from passl.data.region_features import RegionFeatures
from passl.data.samples import Samples
from passl.data.transforms import Compose, Normalize, ToTensor
from passl.evaluators import KNN, Features, evaluate
from passl.models import RegionTransformer, VisionTransformer
from tests.engine import tiny
from tests.engine.test_distributed import launch

pytestmark = pytest.mark.smoke


@pytest.fixture
def images(tmp_path):
    tiny.write_images(tmp_path, size=16)
    return tmp_path


def read(folder, name="features"):
    with (folder / f"{name}.csv").open(newline="") as file:
        return np.load(folder / f"{name}.npy"), list(csv.DictReader(file))


def test_rows_are_those_of_the_samples(images):
    model = VisionTransformer(16, 8, embed_dim=6, depth=1, num_heads=2)
    dataset = ImageFolder(images / "train", Compose([ToTensor(), Normalize()]))
    results = evaluate(Features(dataset, file="train", batch_size=4), model, images)
    assert results == {"train_rows": 15, "train_width": 6}
    rows, index = read(images, "train")
    assert rows.dtype == np.float32
    assert index[7] == {"path": "class1/2.png", "label": "1", "class": "class1"}
    for number in (0, 7, 14):
        image = dataset.sample(number, np.random.default_rng(0))["image"]
        with paddle.no_grad():
            expected = model(paddle.to_tensor(image[None])).numpy()[0]
        np.testing.assert_allclose(rows[number], expected, atol=1e-6)


def test_unreadable_images_are_left_out(images):
    (images / "val/class1/1.png").write_bytes(b"?")
    evaluate(
        Features(ImageList(images / "val", transform=ToTensor())),
        VisionTransformer(16, 8, embed_dim=6, depth=1, num_heads=2),
        images,
    )
    rows, index = read(images)
    assert len(rows) == len(index) == 8
    assert [row["path"] for row in index[3:5]] == ["class1/0.png", "class1/2.png"]
    assert list(index[0]) == ["path"]


def test_features_that_are_not_finite(images):
    model = VisionTransformer(16, 8, embed_dim=6, depth=1, num_heads=2)
    model.norm.bias.set_value(paddle.full([6], float("inf")))
    with pytest.raises(ValueError, match="features are not finite: the weights are damaged"):
        evaluate(Features(ImageList(images / "val", transform=ToTensor())), model, images)


def test_kinds_have_files_of_their_own(images):
    model = VisionTransformer(16, 8, embed_dim=6, depth=2, num_heads=2)
    dataset = ImageFolder(images / "val", Compose([ToTensor(), Normalize()]))
    several = Features(dataset, what=["mean", "patch"], layer=0, dtype="float16", batch_size=2)
    assert evaluate(several, model, images) == {"features_rows": 9, "features_width": 6}
    mean, patch = (np.load(images / f"features.{kind}.npy") for kind in ("mean", "patch"))
    assert patch.shape == (9, 2, 2, 6)
    assert patch.dtype == mean.dtype == np.float16
    np.testing.assert_allclose(patch.astype(np.float32).mean((1, 2)), mean, atol=2e-3)
    assert len(list(csv.DictReader((images / "features.csv").open()))) == 9


def test_memory_does_not_grow_with_the_rows(tmp_path):
    class Patches(Samples):
        def __init__(self):
            super().__init__(None, [], 0)

        def __len__(self):
            return 400

        def describe(self, index):
            return f"{tmp_path}/{index}.png"

        def content(self, index, rng):
            return {"image": np.full((256, 8, 8), index, np.float32)}

    class Wide(paddle.nn.Layer):
        def feature_map(self, images):
            return images

    tracemalloc.start()
    try:
        evaluate(Features(Patches(), what=["patch"], batch_size=4), Wide(), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    rows = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert rows.shape == (400, 8, 8, 256)
    assert (rows[:, 3, 4, 5] == np.arange(400)).all()
    assert peak < rows.nbytes / 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"what": []}, r"what \(\) must be one or more of cls, patch, mean"),
        ({"what": ["cls", "tokens"]}, r"what \(cls, tokens\) must be"),
        ({"dtype": "int8"}, r"dtype \(int8\) must be float16 or float32"),
    ],
)
def test_wrong_kinds(images, change, text):
    with pytest.raises(ValueError, match=text):
        Features(ImageList(images / "val"), **change)


def test_numbers_that_do_not_fit_half_precision(images):
    model = VisionTransformer(16, 8, embed_dim=6, depth=1, num_heads=2)
    model.norm.bias.set_value(paddle.full([6], 1e5))
    evaluator = Features(ImageList(images / "val", transform=ToTensor()), dtype="float16")
    with pytest.raises(ValueError, match=r"features up to 1e\+05 do not fit float16: take float32"):
        evaluate(evaluator, model, images)
    assert not (images / "features.npy").exists()


@pytest.mark.parametrize("file", ["", "a/b", "../a"])
def test_wrong_names(images, file):
    with pytest.raises(ValueError, match=r"file \('.*'\) must be a name, without a folder"):
        Features(ImageList(images / "val"), file=file)


def regions(folder, count: int = 4, dim: int = 5):
    """Two classes of regions: features around +1 and around -1."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, center in (("minus", -1), ("plus", 1)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                np.save(folder / split / label / f"{number}.npy", center + rng.normal(size=(256, dim)) * 0.1)
    return [RegionFeatures(folder / split) for split in ("train", "val")]


def test_embeddings_of_regions_and_their_neighbours(tmp_path):
    paddle.seed(0)
    train, val = regions(tmp_path)
    model = RegionTransformer(5, grid_size=14, embed_dim=8, depth=1, num_heads=2)
    results = evaluate(Features(val, file="val"), model, tmp_path)
    assert results == {"val_rows": 8, "val_width": 8}
    rows, index = read(tmp_path, "val")
    assert [row["class"] for row in index] == ["minus"] * 4 + ["plus"] * 4
    with paddle.no_grad():
        np.testing.assert_allclose(rows[5], model(paddle.to_tensor(val.features(5)[None])).numpy()[0], atol=1e-6)
    assert evaluate(KNN(train, val, k=[3]), model, tmp_path)["knn_top1_k3"] == 100.0


def test_regions_of_another_width(tmp_path):
    _, val = regions(tmp_path)
    model = RegionTransformer(6, embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="the features of the patches are 5 wide, and in_chans is 6"):
        evaluate(Features(val), model, tmp_path)


CONFIG = """
Global: {{output_dir: {folder}/out, device: cpu}}
Model: {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 6, depth: 1, num_heads: 2}}
Evaluators:
  - name: Features
    batch_size: 4
    dataset: &train {{name: ImageFolder, root: {folder}/train, transform: [ToTensor: {{}}, Normalize: {{}}]}}
  - name: KNN
    k: [1, 4]
    train_dataset: *train
    val_dataset: {{name: ImageFolder, root: {folder}/val, transform: [ToTensor: {{}}, Normalize: {{}}]}}
"""


def test_two_processes_write_what_one_does(images):
    config = tiny.write_config(images, CONFIG, "config.yaml")
    one = tiny.run(tiny.EVAL, "-c", config, *tiny.overrides(Global__output_dir=images / "one"))
    assert one.returncode == 0, one.stderr
    results = json.loads((images / "one/VisionTransformer/eval.json").read_text())
    assert [results[name] for name in ("features_rows", "features_width")] == [15, 6]
    assert 0 < results["knn_top1_k4"] <= results["knn_top5_k4"] == 100
    two = launch(images, tiny.ROOT / "tools/eval.py", "-c", config)
    assert two.returncode == 0, two.stdout + two.stderr
    (ours, index), (theirs, other) = (read(images / name / "VisionTransformer") for name in ("one", "out"))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert index == other
    # The votes are counted by both, each for its share.
    assert json.loads((images / "out/VisionTransformer/eval.json").read_text()) == results
