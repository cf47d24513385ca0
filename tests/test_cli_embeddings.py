"""passl-visualize embeddings"""

from __future__ import annotations

import csv
import json
import re
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from passl.cli import visualize_main
from passl.cli.visualize.image_features import drawn
from tests.browser import needs_browser, page_dom

RAW = ["--arch", "RawPixels", "--image_size", "8"]
COLOURS = {"blue": (20, 40, 250), "red": (250, 30, 20)}
METHOD = ["--method", "pca"] if find_spec("sklearn") is None else []  # the oldest supported Paddle is tested without
OUTPUTS = ["embeddings.csv", "embeddings.html", "embeddings.png", "vdl"]


def write_image(path, colour, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (8, 8, 3))
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        for number in range(6):
            write_image(tmp_path / "in" / name / f"{number}.png", colour, number)
    return tmp_path


def run(*arguments):
    visualize_main(["embeddings", *METHOD, *map(str, arguments)])


def table(folder):
    with (folder / "embeddings.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def data_of(folder):
    page = (folder / "embeddings.html").read_text(encoding="utf-8")
    return json.loads(re.findall('<script type="application/json">(.*?)</script>', page, re.DOTALL)[0])


def error(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    return stopped.value.code, capsys.readouterr().err


def test_class_folders(folder, capsys):
    run("--images", folder / "in", *RAW, "--output_dir", folder / "out")
    assert (
        "12 images of 2 classes, t-SNE of 192 features".replace("t-SNE", "PCA" if METHOD else "t-SNE")
        in capsys.readouterr().out
    )
    assert sorted(path.name for path in (folder / "out").iterdir()) == OUTPUTS
    rows = table(folder / "out")
    assert list(rows[0]) == ["path", "class", "x", "y"]
    assert [row["class"] for row in rows] == ["blue"] * 6 + ["red"] * 6
    assert rows[0]["path"] == str(folder / "in/blue/0.png")
    data = data_of(folder / "out")
    assert [one["name"] for one in data["classes"]] == ["blue", "red"]
    assert sorted(data["thumbnails"]) == list(range(12))
    (file,) = (folder / "out/vdl").iterdir()
    assert "vdlrecords" in file.name


def test_the_two_classes_lie_apart(folder):
    for method in ("pca", "pca" if METHOD else "tsne"):
        run("--images", folder / "in", *RAW, "--output_dir", folder / "out", "--method", method)
        points = np.array([[float(row["x"]), float(row["y"])] for row in table(folder / "out")])
        middle = points.reshape(2, 6, 2).mean(axis=1)
        nearest = np.linalg.norm(points[:, None] - middle, axis=2).argmin(axis=1)
        assert nearest.tolist() == [0] * 6 + [1] * 6


def test_a_seed_gives_the_same_files_again(folder):
    for name in ("a", "b"):
        run("--images", folder / "in", *RAW, "--output_dir", folder / name, "--seed", 3, "--thumbnails", 5)
    for name in OUTPUTS[:3]:
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()
    assert sorted(data_of(folder / "a")["thumbnails"]) == [-1] * 7 + list(range(5))


def test_without_class_folders_thumbnails_are_shown(folder):
    images = folder / "in/red"
    run("--images", images, *RAW, "--output_dir", folder / "out", "--method", "pca")
    assert [row["class"] for row in table(folder / "out")] == [""] * 6
    with Image.open(folder / "out/embeddings.png") as picture:
        reds = (np.abs(np.asarray(picture.convert("RGB")).astype(int) - COLOURS["red"]) < 40).all(axis=2).sum()
    assert reds > 3000
    run("--images", folder / "in", *RAW, "--output_dir", folder / "out", "--show", "thumbnails", "--method", "pca")
    with Image.open(folder / "out/embeddings.png") as picture:
        blues = (np.abs(np.asarray(picture.convert("RGB")).astype(int) - COLOURS["blue"]) < 40).all(axis=2).sum()
    assert blues > 3000


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images(folder, count):
    images = [folder / f"in/red/{number}.png" for number in range(count)]
    run("--images", *images, *RAW, "--output_dir", folder / "out")
    assert len(table(folder / "out")) == count


def test_equal_images(folder):
    for number in range(8):
        write_image(folder / f"same/{number}.png", (9, 9, 9))
    run("--images", folder / "same", *RAW, "--output_dir", folder / "out")
    assert {(row["x"], row["y"]) for row in table(folder / "out")} == {("0", "0")}


def test_limit_draws_evenly():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    chosen = drawn(labels, 15, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [6, 3, 6]
    assert np.array_equal(chosen, drawn(labels, 15, seed=1))
    assert not np.array_equal(chosen, drawn(labels, 15, seed=2))
    assert drawn(labels, 99, seed=0).tolist() == list(range(73))


def test_limit(folder):
    run("--images", folder / "in", *RAW, "--output_dir", folder / "out", "--limit", 4, "--method", "pca")
    assert sorted(row["class"] for row in table(folder / "out")) == ["blue", "blue", "red", "red"]


def test_a_vision_transformer_at_its_own_size(folder, capsys):
    network = ["--arch", "VisionTransformer", "--set", "embed_dim=12", "--set", "depth=1", "--set", "num_heads=2"]
    run(
        "--images", folder / "in/red", *network, "--set", "img_size=16", "--patch_size", 8, "--output_dir",
        folder / "out", "--method", "pca",
    )  # fmt: skip
    assert "6 images, PCA of 12 features" in capsys.readouterr().out


def test_unreadable_files_are_left_out(folder, capsys):
    (folder / "in/red/bad.png").write_bytes(b"no image")
    code, text = error(capsys, "--images", folder / "in", *RAW, "--output_dir", folder / "out")
    assert code == 1
    assert "left out: " in text
    assert "bad.png" in text
    assert len(table(folder / "out")) == 12
    code, text = error(capsys, "--images", folder / "in/red/bad.png", *RAW, "--output_dir", folder / "out")
    assert code == 2
    assert "none of the images can be read" in text


# --- features of passl-eval ---


def write_features(folder, columns, count=6, rows=None):
    np.save(folder / "f.npy", np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32))
    lines = [",".join(columns), *(",".join(row) for row in rows)]
    (folder / "f.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_features_with_a_table(folder):
    write_features(
        folder, ["path", "label", "class"], rows=[[f"red/{i}.png", str(i % 3), f"c{i % 3}"] for i in range(6)]
    )
    run("--features", folder / "f.npy", "--output_dir", folder / "out")
    assert [row["class"] for row in table(folder / "out")] == ["c0", "c1", "c2"] * 2
    assert data_of(folder / "out")["sheets"] == []
    run("--features", folder / "f.npy", "--images", folder / "in", "--output_dir", folder / "out")
    assert data_of(folder / "out")["thumbnails"] == list(range(6))
    (folder / "f.csv").rename(folder / "index.csv")  # as passl-eval features has it
    run("--features", folder / "f.npy", "--output_dir", folder / "out2")
    assert table(folder / "out2") == table(folder / "out")


def test_labels_without_names_are_numbers(folder):
    write_features(
        folder,
        ["path", "label"],
        rows=[[f"{i}.png", label] for i, label in enumerate(["9", "10", "2", "-1", "9", "2"])],
    )
    run("--features", folder / "f.npy", "--output_dir", folder / "out")
    data = data_of(folder / "out")
    assert [one["name"] for one in data["classes"]] == ["2", "9", "10"]
    assert data["labels"] == [1, 2, 0, -1, 1, 0]


def test_features_that_do_not_fit(folder, capsys):
    def problem():
        return error(capsys, "--features", folder / "f.npy", "--output_dir", folder / "out")

    code, text = problem()
    assert code == 1
    assert "f.npy: no such file" in text
    write_features(folder, ["path"], rows=[["a.png"]] * 5)
    assert "5 rows for 6 rows of" in problem()[1]
    write_features(folder, ["name"], rows=[["a.png"]] * 6)
    assert "its first line must name the columns, path among them" in problem()[1]
    (folder / "f.csv").write_bytes("path\ncafé.png\n".encode("latin-1"))
    assert "f.csv: no table in UTF-8" in problem()[1]
    write_features(folder, ["path"], count=0, rows=[])
    assert "features must be [N, D] with N > 0" in problem()[1]
    write_features(folder, ["path"], rows=[[f"{i}.png"] for i in range(6)])
    features = np.load(folder / "f.npy")
    features[3, 1] = np.nan
    np.save(folder / "f.npy", features)
    assert "the features of 1 rows are not finite: 3.png" in problem()[1]
    (folder / "f.csv").unlink()
    assert "there is no f.csv or index.csv beside it" in problem()[1]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "no images: give --images DIR, or --features F.npy"),
        (["--images", "nowhere", *RAW], "--images nowhere: no such file or folder"),
        (["--images", "in", *RAW, "--method", "pca", "--perplexity", "2"], "--perplexity is of --method tsne"),
        (["--features", "f.npy", *RAW], "--features are there already"),
        (["--features", "f.npy", "--show", "thumbnails"], "--show thumbnails needs the images"),
        (["--images", "in"], "no network: give --pretrained_model X"),
    ],
)
def test_errors(arguments, wanted, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    code, text = error(capsys, *arguments, "--output_dir", "out")
    assert code == 2
    assert wanted in text


def test_more_perplexity_than_images(folder, capsys):
    pytest.importorskip("sklearn")
    code, text = error(capsys, "--images", folder / "in/red", *RAW, "--perplexity", 6, "--output_dir", folder / "out")
    assert code == 2
    assert "perplexity (6) must be greater than 0 and less than the 6 images" in text


def test_an_empty_folder(tmp_path, capsys):
    assert "contains no images" in error(capsys, "--images", tmp_path, *RAW)[1]


@needs_browser
def test_hostile_names_in_a_browser(folder):
    name = "<img src=x onerror=document.title=1>.png"
    write_image(folder / "in/<b>bold<" / name, (0, 200, 0))
    run("--images", folder / "in", *RAW, "--output_dir", folder / "out", "--method", "pca")
    dom = page_dom(folder / "out/embeddings.html")
    assert 'data-drawn="13"' in dom
    assert "<img" not in dom
    assert "<b>bold" not in dom
    assert "&lt;b&gt;bold&lt;" in dom
