"""Feature files of regions: what is in them, and what an interrupted or repeated extraction does."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.data.datasets import ImageFolder, ImageList
from passl.data.region_features import RegionFeatures
from passl.data.transforms import Normalize, ToTensor
from passl.evaluators import RegionExtraction, evaluate
from passl.evaluators import region_extraction as module
from passl.models import VisionTransformer
from tests.engine import tiny
from tests.engine.test_distributed import launch

SIZE = 16


def backbone(seed: int = 0) -> VisionTransformer:
    paddle.seed(seed)
    return VisionTransformer(SIZE, 8, embed_dim=6, depth=1, num_heads=2)


def draw(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def patches_one_by_one(model, pixels: np.ndarray) -> np.ndarray:
    rows, columns = (side // SIZE for side in pixels.shape[:2])
    rng, features = np.random.default_rng(0), []
    for i in range(rows):
        for j in range(columns):
            patch = Image.fromarray(pixels[i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE])
            image = Normalize()(ToTensor()(patch, rng), rng)
            features.append(model(paddle.to_tensor(image[None])).numpy()[0])
    return np.array(features)


def extract(folder: Path, out: str = "out", model=None, dataset=None, **arguments) -> dict:
    dataset = dataset or ImageList(folder / "images")
    evaluator = RegionExtraction(dataset, patch_size=SIZE, batch_size=5, **arguments)
    results = evaluate(evaluator, model or backbone(), folder / out)
    assert evaluator.key_metric in results
    return results


def lines(folder: Path) -> list[dict]:
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.smoke
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("output", ["npy", "npz", "pt"])
def test_features_of_patches_row_by_row(tmp_path, output, num_workers):
    square, wide = (draw(tmp_path / "images" / name, *size) for name, size in (
        ("slide/a.png", (64, 64)), ("slide/b.png", (32, 80)),
    ))  # fmt: skip
    model = backbone()
    results = extract(tmp_path, model=model, output=output, num_workers=num_workers)
    assert results == {"regions": 2, "patches": 26, "regions_skipped": 0, "regions_left_out": 0}
    folder = tmp_path / "out/features"
    for name, pixels, grid in (("a", square, [4, 4]), ("b", wide, [2, 5])):
        path = folder / f"slide/{name}.{output}"
        (tmp_path / "list.txt").write_text(f"{path}\n")
        dataset = RegionFeatures(list_file=tmp_path / "list.txt", grid=grid)
        features = dataset.features(0).transpose(1, 2, 0).reshape(-1, 6)
        np.testing.assert_allclose(features, patches_one_by_one(model, pixels), atol=2e-6)
    assert lines(folder) == [
        {"path": f"slide/a.{output}", "region": "slide/a.png", "grid_height": "4", "grid_width": "4"},
        {"path": f"slide/b.{output}", "region": "slide/b.png", "grid_height": "2", "grid_width": "5"},
    ]
    assert sorted(p.name for p in folder.iterdir()) == ["extraction.json", "index.csv", "slide"]


@pytest.mark.smoke
def test_a_whole_region_of_4096_pixels(tmp_path):
    """256 patches of 256 pixels: [256, 384] from the network's own width."""
    draw(tmp_path / "images/region.jpg", 4096, 4096)
    paddle.seed(0)
    model = VisionTransformer(256, 64, embed_dim=384, depth=1, num_heads=6)
    evaluator = RegionExtraction(ImageList(tmp_path / "images"))
    assert evaluate(evaluator, model, tmp_path)["patches"] == 256
    features = np.load(tmp_path / "features/region.npy")
    assert features.shape == (256, 384)
    assert features.dtype == np.float32


def test_classes_come_along(tmp_path):
    for name in ("ring/a", "band/b"):
        draw(tmp_path / f"images/{name}.png", 32, 32)
    extract(tmp_path, dataset=ImageFolder(tmp_path / "images"))
    folder = tmp_path / "out/features"
    assert [row["label"] for row in lines(folder)] == ["band", "ring"]
    for dataset in (RegionFeatures(folder), RegionFeatures(list_file=folder / "index.csv")):
        assert dataset.class_names == ["band", "ring"]
        assert dataset.labels.tolist() == [0, 1]


@pytest.mark.smoke
def test_what_is_there_is_skipped(tmp_path, monkeypatch):
    for number in range(4):
        draw(tmp_path / f"images/{number}.png", 32, 32, seed=number)
    assert extract(tmp_path)["regions_skipped"] == 0
    folder = tmp_path / "out/features"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.npy")}
    (folder / "1.npy").unlink()
    (folder / "2.npy").write_bytes(before["2.npy"][0][:100])
    index = (folder / "index.csv").read_bytes()
    read = []
    pixels_of = RegionExtraction._pixels
    monkeypatch.setattr(RegionExtraction, "_pixels", lambda self, n: [read.append(n), pixels_of(self, n)][1])
    results = extract(tmp_path)
    assert results == {"regions": 4, "patches": 16, "regions_skipped": 2, "regions_left_out": 0}
    assert read == [1, 2]  # the others are not even decoded
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.npy")}
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert [name for name in after if after[name][1] == before[name][1]] == ["0.npy", "3.npy"]
    assert (folder / "index.csv").read_bytes() == index


def test_a_killed_extraction_goes_on(tmp_path, monkeypatch):
    """It has written a file that it could not note, and half a note."""
    for number in range(4):
        draw(tmp_path / f"images/{number}.png", 32, 32, seed=number)
    whole = extract(tmp_path, out="whole")

    def write_or_die(path, features):
        write(path, features)
        if path.stem == "2":
            raise KeyboardInterrupt

    write = module.write_features
    monkeypatch.setattr(module, "write_features", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path)
    monkeypatch.undo()
    folder = tmp_path / "out/features"
    with (folder / ".index-0.csv").open("a") as journal:
        journal.write("3.npy,3.pn")
    forwards = []
    model = backbone()
    model.register_forward_post_hook(lambda *_: forwards.append(1))
    results = extract(tmp_path, model=model)
    assert results == {**whole, "regions_skipped": 2}
    assert len(forwards) == 1  # of region 3
    assert (folder / "index.csv").read_bytes() == (tmp_path / "whole/features/index.csv").read_bytes()
    assert not list(folder.glob(".index*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 1}, r"holds features that were made otherwise \(weights \d+ -> \d+\): give another folder"),
        ({"mean": [0.5, 0.5, 0.5]}, r"made otherwise \(mean \[0.485, 0.456, 0.406\] -> \[0.5, 0.5, 0.5\]\)"),
        ({"output": "pt"}, r"made otherwise \(output npy -> pt\)"),
    ],
)
def test_features_of_other_weights_or_settings_are_not_mixed(tmp_path, change, message):
    draw(tmp_path / "images/a.png", 32, 32)
    extract(tmp_path)
    if "model" in change:
        change = {"model": backbone(change["model"])}
    with pytest.raises(ValueError, match=message):
        extract(tmp_path, **change)


@pytest.mark.smoke
def test_images_that_cannot_be_used_are_reported_and_left_out(tmp_path, caplog):
    draw(tmp_path / "images/good.png", 32, 32)
    draw(tmp_path / "images/odd.png", 40, 32)
    draw(tmp_path / "images/small.png", 8, 8)
    (tmp_path / "images/broken.png").write_bytes(b"not an image")
    (tmp_path / "images/empty.jpg").write_bytes(b"")
    with caplog.at_level("WARNING", logger="passl"):
        results = extract(tmp_path)
    assert results == {"regions": 1, "patches": 4, "regions_skipped": 0, "regions_left_out": 4}
    texts = "\n".join(record.getMessage() for record in caplog.records)
    for reason in (
        "broken.png: not an image that Pillow can identify",
        "empty.jpg: the file is empty (0 bytes)",
        "odd.png: height and width (40 x 32) must be multiples of patch_size (16); or set remainder: crop, or pad",
        "small.png: 8 x 8 pixels are less than a patch (16)",
    ):
        assert reason in texts
    assert [row["path"] for row in lines(tmp_path / "out/features")] == ["good.npy"]


def test_no_usable_image(tmp_path):
    draw(tmp_path / "images/odd.png", 40, 32)
    with pytest.raises(ValueError, match="none of the 1 regions can be used: .*odd.png: height and width"):
        extract(tmp_path)


def test_remainders(tmp_path):
    pixels = draw(tmp_path / "images/odd.png", 40, 35)
    model = backbone()
    extract(tmp_path, "crop", model, remainder="crop")
    cut = np.load(tmp_path / "crop/features/odd.npy")
    np.testing.assert_allclose(cut, patches_one_by_one(model, pixels[:32, :32]), atol=2e-6)
    extract(tmp_path, "pad", model, remainder="pad")
    filled = np.full((48, 48, 3), 255, np.uint8)
    filled[:40, :35] = pixels
    np.testing.assert_allclose(np.load(tmp_path / "pad/features/odd.npy"), patches_one_by_one(model, filled), atol=2e-6)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels(tmp_path, monkeypatch):
    draw(tmp_path / "images/a.png", 32, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # refused from 1001
    with pytest.raises(ValueError, match="DecompressionBombError"):
        extract(tmp_path)
    assert extract(tmp_path, max_pixels=2000)["regions"] == 1
    assert Image.MAX_IMAGE_PIXELS == 500


def test_features_that_are_not_finite(tmp_path):
    draw(tmp_path / "images/a.png", 32, 32)
    model = backbone()
    model.norm.bias.set_value(paddle.full([6], float("nan")))
    with pytest.raises(ValueError, match="features are not finite"):
        extract(tmp_path, model=model)
    assert not list((tmp_path / "out").rglob("*.npy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, r"patch_size \(0\) must be at least 1"),
        ({"max_pixels": 0}, r"max_pixels \(0\) must be at least 1"),
        ({"remainder": "stretch"}, r"remainder \('stretch'\) must be refuse, crop or pad"),
        ({"output": "h5"}, r"output \('h5'\) npy, npz or pt"),
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    draw(tmp_path / "images/a.png", 32, 32)
    with pytest.raises(ValueError, match=message):
        RegionExtraction(ImageList(tmp_path / "images"), **arguments)


def test_two_images_with_one_name(tmp_path):
    for name in ("a.png", "a.bmp"):
        draw(tmp_path / "images" / name, 32, 32)
    with pytest.raises(ValueError, match="'a.bmp' and 'a.png' would both become 'a.npy': rename one"):
        RegionExtraction(ImageList(tmp_path / "images"))


CONFIG = """
Global: {{output_dir: {folder}/out, device: cpu}}
Model: {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 6, depth: 1, num_heads: 2}}
Evaluators:
  - {{name: RegionExtraction, patch_size: 16, dataset: {{name: ImageList, root: {folder}/images}}}}
"""


def test_two_processes_share_the_regions(tmp_path):
    for number in range(5):
        draw(tmp_path / f"images/{number}.png", 32, 48, seed=number)
    (tmp_path / "images/bad.png").write_bytes(b"?")
    config = tiny.write_config(tmp_path, CONFIG, "config.yaml")
    one = tiny.run(tiny.EVAL, "-c", config, *tiny.overrides(Global__output_dir=tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    done = launch(tmp_path, tiny.ROOT / "tools/eval.py", "-c", config)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (tmp_path / name / "VisionTransformer" for name in ("one", "out"))
    results = json.loads((theirs / "eval.json").read_text())
    assert results == json.loads((ours / "eval.json").read_text())
    assert results == {"regions": 5, "patches": 30, "regions_skipped": 0, "regions_left_out": 1}
    assert sorted(p.name for p in (theirs / "features").iterdir()) == sorted(
        ["extraction.json", "index.csv", *(f"{number}.npy" for number in range(5))]
    )
    for path in sorted((ours / "features").iterdir()):
        assert path.read_bytes() == (theirs / "features" / path.name).read_bytes(), path.name
    assert "bad.png: not an image" in (theirs / "eval.log").read_text()
    again = launch(tmp_path, tiny.ROOT / "tools/eval.py", "-c", config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((theirs / "eval.json").read_text())["regions_skipped"] == 5


def test_regions_of_other_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (32, 48, 2)).astype(np.uint16)
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images/a.npy", pixels)
    paddle.seed(0)
    model = VisionTransformer(SIZE, 8, in_chans=2, embed_dim=6, depth=1, num_heads=2)
    statistics = {"mean": [0.4, 0.6], "std": [0.2, 0.3]}
    extract(tmp_path, model=model, dataset=ImageList(tmp_path / "images", channels=2), **statistics)
    found = np.load(tmp_path / "out/features/a.npy")
    unit = pixels.astype(np.float32) / 65535
    patches = [unit[r : r + SIZE, c : c + SIZE] for r in (0, 16) for c in (0, 16, 32)]
    images = (np.stack(patches).transpose(0, 3, 1, 2) - [[[0.4]], [[0.6]]]) / [[[0.2]], [[0.3]]]
    with paddle.no_grad():
        expected = model(paddle.to_tensor(images.astype(np.float32))).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
