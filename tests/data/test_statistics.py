"""passl.data.statistics and ``passl-data stats``: the same numbers as numpy over all pixels at once."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
import tifffile
from PIL import Image

from passl.cli import data_main
from passl.config import load
from passl.data.datasets import ImageList
from passl.data.statistics import Concatenated, measure, usual_channels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Per channel count: images of several sizes and types."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for channels in (1, 2, 3, 4, 9):
        for number in range(20):
            height, width = rng.integers(1, 40, 2)
            array = rng.random((height, width, channels)) * rng.random(channels) + rng.random(channels)
            path = folder / f"{channels}" / "sub" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = number % 4
            if kind == 0:
                np.save(f"{path}.npy", array.astype(np.float32))
            elif kind == 1:
                np.save(f"{path}.npy", (array * 32000).astype(np.uint16))
            elif kind == 2 and channels > 1:
                options = {"photometric": "minisblack", "planarconfig": "contig"}
                tifffile.imwrite(f"{path}.tif", (array * 120).astype(np.uint8), **options)
            else:
                np.save(f"{path}.npy", array * 1e3)
    return folder


def numbers(folder, channels: int) -> np.ndarray:
    """All pixels [N, C]"""
    parts = []
    for path in sorted((folder / str(channels)).rglob("*.*")):
        array = np.load(path) if path.suffix == ".npy" else tifffile.imread(path)
        scale = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(array.dtype, 1)
        parts.append(array.reshape(-1, channels).astype(np.float64) / scale)
    return np.concatenate(parts)


@pytest.mark.smoke
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_numbers_are_numpys(folder, channels, num_workers, tmp_path, capsys):
    out = tmp_path / "stats.yaml"
    source = folder / str(channels)
    data_main(["stats", str(source), "--num-workers", str(num_workers), "--out", str(out)])
    found = load(out)["Data"]
    expected = numbers(folder, channels)
    assert found["channels"] == channels
    np.testing.assert_allclose(found["mean"], expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], expected.std(0), rtol=1e-12)
    shown = capsys.readouterr().out
    assert f"{source}: 20 images\n" in shown
    assert "float32 5, float64 " in shown
    # It is a piece for a configuration.
    (tmp_path / "config.yaml").write_text("_base_: stats.yaml\nGlobal: {seed: 1}\n")
    assert load(tmp_path / "config.yaml")["Data"] == found


def test_a_large_offset_costs_no_digits(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [1e8 + rng.random((20, 30, 2)) for _ in range(10)]
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    images = Concatenated([ImageList(tmp_path, channels=2)], 2)
    *_, (done, total, bad) = measure(images, range(len(images)))
    assert (done, bad) == (10, [])
    np.testing.assert_allclose(total.std, np.stack(arrays).std((0, 1, 2)), rtol=1e-7)


def test_the_result_does_not_depend_on_the_number_of_workers(folder):
    images = Concatenated([ImageList(folder / "9", channels=9), ImageList(folder / "9", channels=9)], 9)
    results = [list(measure(images, range(40), num_workers))[-1] for num_workers in (0, 3)]
    assert results[0][0] == results[1][0] == 40
    np.testing.assert_array_equal(results[0][1].mean, results[1][1].mean)
    np.testing.assert_array_equal(results[0][1].squares, results[1][1].squares)


def test_unreadable_images_are_named_and_left_out(folder, tmp_path, capsys):
    np.save(tmp_path / "good.npy", np.full((4, 5, 2), 0.5) * [1.0, 3.0])
    np.save(tmp_path / "nan.npy", np.full((4, 5, 2), np.nan))
    np.save(tmp_path / "three.npy", np.zeros((4, 5, 3)))
    (tmp_path / "broken.tif").write_bytes(b"II*\0 nothing")
    data_main(["stats", str(tmp_path), "--channels", "2"])
    shown = capsys.readouterr()
    assert "3 could not be read and are left out" in shown.err
    assert all(
        name in shown.err for name in ("nan.npy: 40 of 40 values are not finite", "three.npy: has 3", "broken.tif")
    )
    assert "1 images, 3 unreadable left out" in shown.out
    assert "channels: 2\n  mean: [0.5, 1.5]\n  std: [1.0, 1.0]\n" in shown.out
    assert "constant, so their std is set to 1: channel 0, 1" in shown.err


def test_pictures_are_rgb_where_some_are(tmp_path):
    rng = np.random.default_rng(0)
    for number, mode in enumerate(("L", "L", "RGB", "P", "RGBA")):
        Image.fromarray((rng.random((9, 9, 3)) * 255).astype(np.uint8)).convert(mode).save(tmp_path / f"{number}.png")
    images = Concatenated([ImageList(tmp_path)])
    assert usual_channels(images) == 3
    images.channels = 3
    *_, (_, total, bad) = measure(images, range(5))
    assert total.num_images == 5
    assert not bad


def test_a_share_of_the_images_and_lists(folder, tmp_path, capsys):
    listed = tmp_path / "list.csv"
    paths = sorted((folder / "4").rglob("*.*"))
    listed.write_text("path\n" + "".join(f"{path}\n" for path in paths))
    printed = []
    for seed in ("1", "1", "2"):
        data_main(["stats", str(listed), "--limit", "5", "--seed", seed])
        printed.append(capsys.readouterr().out)
    assert "5 images, drawn from 20 with seed 1" in printed[0]
    assert printed[0] == printed[1]
    assert printed[0].splitlines()[3:] != printed[2].splitlines()[3:]


def test_tarballs(folder, tmp_path, capsys):
    with tarfile.open(tmp_path / "pretrain_dataset.tar", "w") as tarball:
        tarball.add(folder / "4", "images")
    index = ["--tarball_path", str(tmp_path / "pretrain_dataset.tar"), "--output_root", str(tmp_path)]
    data_main(["tar-index", *index, "--prefix", "pretrain"])
    for source in (tmp_path, tmp_path / "pretrain_dataset.tar"):
        data_main(["stats", str(source), "--num-workers", "2", "--out", str(tmp_path / "stats.yaml")])
        np.testing.assert_allclose(
            load(tmp_path / "stats.yaml")["Data"]["mean"], numbers(folder, 4).mean(0), rtol=1e-12
        )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere is not there"),
        (["FOLDER", "--out", "FOLDER"], "a folder is there; name a file such as"),
        (["FOLDER", "--channels", "7"], "none of the 20 images can be read"),
        (["FOLDER", "--channels", "none"], "must be a whole number from 1"),
    ],
)
def test_errors(folder, arguments, text, capsys):
    arguments = [str(folder / "2") if argument == "FOLDER" else argument for argument in arguments]
    with pytest.raises(SystemExit):
        data_main(["stats", *arguments])
    assert text in capsys.readouterr().err
