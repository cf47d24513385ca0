"""passl-predict: sources in, classes and features out."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image

from passl import exported
from passl.cli import predict_main
from passl.data.datasets import ImageList
from passl.export import export
from passl.exported import ExportedNetwork
from passl.models import LinearProbe, VisionTransformer
from passl.models.exportable import FeatureNetwork, ProbeNetwork
from passl.predict import FeatureFile, Picture, Prediction, SourceError, find_files, pictures, predict, table_line
from tests.engine import tiny

pytestmark = pytest.mark.smoke


def vit():
    return VisionTransformer(16, 8, 3, 12, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    tiny.write_images(folder, train=1)
    paddle.seed(0)
    probe = LinearProbe(vit, 3, 2)
    export(
        ProbeNetwork(probe), folder / "probe.passl", exported.standard_preprocessing(16, 16), 16, 16, "paddle", "abc"
    )
    export(FeatureNetwork(vit()), folder / "any.passl", exported.standard_preprocessing(16, 16))
    return folder


@pytest.fixture
def with_a_bad_file(folder):
    bad = folder / "val/class1/00.png"
    bad.write_bytes(b"no image")
    yield str(bad)
    bad.unlink()


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_sources(folder, tmp_path, monkeypatch):
    everything = ImageList(folder / "val").paths
    assert find_files([str(folder / "val")]) == everything
    assert find_files([str(folder / "val/**")]) == everything
    assert find_files([str(folder / "val/*/0.png")]) == [path for path in everything if path.endswith("/0.png")]
    monkeypatch.chdir(folder / "val")
    assert find_files(["class0/1.png", "class0/1.png"]) == ["class0/1.png"] * 2
    (tmp_path / "[1].png").touch()
    assert find_files([str(tmp_path / "[1].png")]) == [str(tmp_path / "[1].png")]
    for source, text in (("nope.png", "no such file"), ("*.jpg", "nor a pattern that fits"), ("empty", "no images")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SourceError, match=text):
            find_files([str(tmp_path / source)])


def test_predictions_are_those_of_the_network_in_order(folder):
    network = ExportedNetwork(folder / "probe.passl")
    paths = ImageList(folder / "val").paths
    transform = exported.transform(network.meta.preprocessing)
    whole = network(np.stack([transform(picture.read()) for picture in pictures(paths)]))
    for batch_size, num_workers in ((1, 1), (4, 3), (100, 2)):
        found = list(predict(network, pictures(paths), transform, batch_size, num_workers))
        assert [one.name for one in found] == paths
        for name in ("features", "probabilities"):
            rows = np.stack([getattr(one, name) for one in found])
            np.testing.assert_allclose(rows, whole[name], rtol=0, atol=1e-6)


def test_images_of_different_sizes_go_in_batches_of_one_size(folder):
    network = ExportedNetwork(folder / "any.passl")
    sizes = [(16, 16), (16, 16), (32, 16), (16, 16)]
    images = [Picture(str(size), lambda size=size: Image.new("RGB", size)) for size in sizes]
    transform = exported.transform([{"ToTensor": {}}])
    found = list(predict(network, images, transform))
    assert [one.name for one in found] == [str(size) for size in sizes]
    np.testing.assert_allclose(found[0].features, found[3].features, rtol=0, atol=1e-6)
    assert np.abs(found[0].features - found[2].features).max() > 1e-3


def test_the_table(folder, capsys):
    predict_main([str(folder / "probe.passl"), str(folder / "val"), "--topk", "2"])
    printed = capsys.readouterr()
    rows = printed.out.splitlines()
    assert len(rows) == 9
    assert str(folder / "val/class0/0.png").endswith(rows[0].split()[0].removeprefix("..."))
    assert rows[0].count("%") == 2


def test_a_row_of_the_table():
    row = Prediction("a/long/name.png", np.zeros(3), np.array([0.25, 0.75, 0.0]))
    assert table_line(row, ["ant", "bee", "cat"], 2, (11, 4)) == "...name.png  bee   75.0 %  ant   25.0 %"
    assert table_line(Prediction("x.png", error="empty"), ["ant"], 2, (6, 4)) == "x.png   empty"


def test_json_lines_features_and_unreadable_files(folder, with_a_bad_file, tmp_path, capsys):
    options = ["--output", str(tmp_path / "o.jsonl"), "--features", str(tmp_path / "f.npy"), "--batch-size", "4"]
    with pytest.raises(SystemExit) as stopped:
        predict_main([str(folder / "probe.passl"), str(folder / "val"), *options])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert f"1 could not be read and are left out:\n  {with_a_bad_file}: not an image" in printed.err
    rows = lines((tmp_path / "o.jsonl").read_text())
    assert [row["path"] for row in rows] == ImageList(folder / "val").paths
    assert [row["path"] for row in rows if "error" in row] == [with_a_bad_file]
    good = [row for row in rows if "error" not in row]
    assert [one["class"] for one in good[0]["classes"]] == sorted(
        "abc", key=lambda name: -{one["class"]: one["probability"] for one in good[0]["classes"]}[name]
    )
    features = np.load(tmp_path / "f.npy")
    names = (tmp_path / "f.txt").read_text().splitlines()
    assert names == [row["path"] for row in good]
    network = ExportedNetwork(folder / "probe.passl")
    transform = exported.transform(network.meta.preprocessing)
    last = network(transform(next(pictures(names[-1:])).read())[None])["features"]
    np.testing.assert_allclose(features[-1:], last, rtol=0, atol=1e-6)
    assert features.shape == (9, 12)


def test_features_alone_at_another_size(folder, tmp_path, capsys):
    source = str(folder / "val/class0/0.png")
    predict_main([str(folder / "any.passl"), source, "--features", str(tmp_path / "f.npy"), "--image-size", "32x16"])
    assert not capsys.readouterr().out
    network = ExportedNetwork(folder / "any.passl")
    transform = exported.transform(exported.standard_preprocessing(32, 16))
    row = network(transform(Image.open(source).convert("RGB"))[None])["features"]
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), row, rtol=0, atol=1e-6)
    with pytest.raises(SystemExit):
        predict_main([str(folder / "any.passl"), source])
    assert (
        "ask for them with --features FILE.npy, or export with a linear probe or --knn-bank" in capsys.readouterr().err
    )


def test_names_that_are_no_text(folder, tmp_path):
    """Not in UTF-8, or of two lines: still one name in each line of the file."""
    odd = [os.fsencode(tmp_path) + name for name in (b"/\xff.png", b"/a\nb.png")]
    for name in odd:
        shutil.copyfile(folder / "val/class0/0.png", name)
    options = ["--output", str(tmp_path / "o.jsonl"), "--features", str(tmp_path / "f.npy")]
    predict_main([str(folder / "probe.passl"), *map(os.fsdecode, odd), *options])
    shown = [f"{tmp_path}/\ufffd.png", f"{tmp_path}/a\nb.png"]
    assert [row["path"] for row in lines((tmp_path / "o.jsonl").read_text("utf-8"))] == shown
    names = (tmp_path / "f.txt").read_text("utf-8").splitlines()
    assert names == [name.replace("\n", " ") for name in shown]
    assert np.load(tmp_path / "f.npy").shape == (2, 12)


def test_no_half_written_features(tmp_path):
    def interrupted():
        with FeatureFile(tmp_path / "f.npy") as file:
            file.add(Prediction("a", np.zeros(3, np.float32)))
            assert not list(tmp_path.iterdir())  # what a kill would leave
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        interrupted()
    assert not list(tmp_path.iterdir())
    with pytest.raises(SourceError, match=r"must end in \.npy"):
        FeatureFile(tmp_path / "f.csv")


def test_a_video(folder, tmp_path, capsys):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(7):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * number, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)
    found = list(pictures([str(path)], frame_step=3))
    assert [picture.name for picture in found] == [f"{path}#{number}" for number in (0, 3, 6)]
    assert abs(np.asarray(found[1].read()).mean() - 90) < 5
    assert find_files([str(tmp_path)]) == [str(path)]
    path.write_bytes(b"no video")
    with pytest.raises(SystemExit):
        predict_main([str(folder / "probe.passl"), str(path)])
    assert "the video ends at frame 0" in capsys.readouterr().err


def test_a_video_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(exported.ExportError, match=r'av is not installed: pip install "passl\[video\]"'):
        next(pictures([str(tmp_path / "clip.mp4")]))
