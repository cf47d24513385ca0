"""Regions of features: files of all kinds, and the views of them, against recorded ones of clemsgrs/dino."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from passl.data.feature_files import write_features
from passl.data.image_io import UnreadableImageError
from passl.data.loader import EpochSampler, Loader
from passl.data.region_features import RegionFeatures, RegionMultiCrop, region_view
from passl.formats.torch_writer import save_torch

pytestmark = pytest.mark.smoke


def features(number: int = 0, n: int = 256, dim: int = 5, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(number).normal(size=(n, dim)).astype(dtype)


def grid_of(array: np.ndarray, rows: int = 16) -> np.ndarray:
    """The rule in words: element [d, i, j] is that of row i * columns + j."""
    n, dim = array.shape
    columns = n // rows
    return np.array([[[array[i * columns + j, d] for j in range(columns)] for i in range(rows)] for d in range(dim)])


@pytest.fixture
def recorded(reference):
    if not (reference / "hipt_models.npz").exists():
        pytest.skip("this recording has no hipt_models.npz")
    arrays = np.load(reference / "hipt_models.npz")
    meta = json.loads((reference / "hipt_meta.json").read_text())["region"]
    return arrays, meta["img_size"] // meta["patch"]


# --- views ---


def loaded(tmp_path, array):
    np.save(tmp_path / "region.npy", array)
    return RegionFeatures(tmp_path).sample(0, np.random.default_rng(0))["image"]


def test_the_grid_is_the_recorded_one(recorded, tmp_path):
    arrays, side = recorded
    grid = loaded(tmp_path, arrays["region_aug/input"])
    assert grid.shape[1:] == (side, side)
    whole = [np.array_equal(view, grid) for view in arrays["region_aug/global_full_grid"]]
    mirrored = [np.array_equal(view, grid[:, :, ::-1]) for view in arrays["region_aug/global_full_grid"]]
    assert all(a or b for a, b in zip(whole, mirrored))


def test_recorded_local_views_are_windows(recorded, tmp_path):
    arrays, side = recorded
    grid = loaded(tmp_path, arrays["region_aug/input"])
    views = arrays["region_aug/local"].reshape(-1, *arrays["region_aug/local"].shape[2:])
    height, width = views.shape[2:]
    assert (height, width) == (int(0.375 * side),) * 2
    for view in views:
        # The features are their own places: channel 0 counts the patches.
        flip = bool(view[0, 0, 0] > view[0, 0, -1])
        first = np.argwhere(grid[0] == view[0, 0, -1 if flip else 0])[0]
        np.testing.assert_array_equal(region_view(grid, *map(int, first), height, width, flip), view)


def test_views_have_the_recorded_shapes(recorded, tmp_path):
    arrays, _ = recorded
    views = RegionMultiCrop()(loaded(tmp_path, arrays["region_aug/input"]), np.random.default_rng(0))
    shapes = [list(view.shape) for name in ("global_crops", "local_crops") for view in views[name]]
    assert shapes == arrays["region_aug/shapes"].tolist()


def test_windows_and_flips_are_uniform():
    """Each place of a window and each direction is drawn equally often, independently for each view."""
    grid = np.arange(256, dtype=np.float32).reshape(1, 16, 16)
    transform, rng = RegionMultiCrop(), np.random.default_rng(0)
    draws = [transform(grid, rng) for _ in range(1500)]
    for name, side in (("global_crops", 14), ("local_crops", 6)):
        views = np.concatenate([draw[name] for draw in draws])[:, 0]
        flips = views[:, 0, 0] > views[:, 0, -1]
        assert abs(flips.mean() - 0.5) < 4 * 0.5 / len(flips) ** 0.5
        counts = np.bincount(views.min((1, 2)).astype(int), minlength=256).reshape(16, 16)
        places = 17 - side
        inside, expected = counts[:places, :places], len(views) / places**2
        assert counts.sum() == inside.sum() == len(views)
        assert ((inside - expected) ** 2 / expected).sum() < places**2 + 5 * (2 * places**2) ** 0.5
    first, second = (np.array([draw["global_crops"][i].min() for draw in draws]) for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_views_of_a_region_that_is_not_square():
    grid = np.zeros((3, 8, 16), np.float32)
    views = RegionMultiCrop(num_local_crops=2)(grid, np.random.default_rng(0))
    assert views["global_crops"].shape == (2, 3, 7, 14)
    assert views["local_crops"].shape == (2, 3, 3, 6)
    assert "local_crops" not in RegionMultiCrop(num_local_crops=0)(grid, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_crops_scale": 1.1}, "global_crops_scale must be above 0 and at most 1, not 1.1"),
        ({"local_crops_scale": 0}, "local_crops_scale must be above 0 and at most 1, not 0"),
        ({"num_local_crops": -1}, "num_local_crops must be at least 0, not -1"),
        ({"flip_prob": 2}, "flip_prob must be a probability between 0 and 1, not 2"),
    ],
)
def test_wrong_views(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegionMultiCrop(**arguments)


def test_views_of_an_image():
    with pytest.raises(ValueError, match="takes the grids of RegionFeatures, not Image: use MultiCrop"):
        RegionMultiCrop()(Image.new("RGB", (32, 32)), np.random.default_rng(0))


def test_a_view_without_patches():
    with pytest.raises(ValueError, match="a view of 0.375 of a region of 2 x 2 patches would be empty"):
        RegionMultiCrop()(np.zeros((1, 2, 2), np.float32), np.random.default_rng(0))


# --- files ---


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_formats_and_types(tmp_path, suffix, dtype):
    array = features(dtype=dtype)
    write_features(tmp_path / f"region{suffix}", array)
    sample = RegionFeatures(tmp_path).sample(0, np.random.default_rng(0))
    assert sample["image"].dtype == np.float32
    assert sample["image"].flags.c_contiguous
    assert "label" not in sample
    np.testing.assert_array_equal(sample["image"], grid_of(array.astype(np.float32)))


def test_npy_files_are_mapped(tmp_path):
    np.save(tmp_path / "region.npy", features())
    grid = RegionFeatures(tmp_path).features(0)
    while isinstance(grid.base, np.ndarray) and not isinstance(grid, np.memmap):
        grid = grid.base
    assert isinstance(grid, np.memmap)


def test_batches_of_views(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", features(number))
    loader = Loader(RegionFeatures(tmp_path, transform=RegionMultiCrop()), EpochSampler(4, 2), seed=1)
    batch = next(iter(loader.iterate(0, 1)))
    assert batch["global_crops"].shape == (4, 5, 14, 14)
    assert batch["local_crops"].shape == (16, 5, 6, 6)
    assert sorted(batch) == ["global_crops", "index", "local_crops"]


def test_class_folders_are_labels(tmp_path):
    for number, name in enumerate(("b/slide", "a/slide", "a")):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / name / "region.npy", features(number))
    dataset = RegionFeatures(tmp_path)
    assert dataset.class_names == ["a", "b"]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert [dataset.describe(i) for i in range(3)] == [
        str(tmp_path / n / "region.npy") for n in ("a", "a/slide", "b/slide")
    ]
    assert RegionFeatures(tmp_path, class_folders=False).labels is None
    np.save(tmp_path / "stray.npy", features())
    assert RegionFeatures(tmp_path).labels is None
    with pytest.raises(ValueError, match=r"contains feature files directly \(such as 'stray.npy'\)"):
        RegionFeatures(tmp_path, class_folders=True)


def test_a_csv_names_files_and_labels(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", features())
    (tmp_path / "index.csv").write_text("path,region,grid_height,grid_width,label\nb.npy,b.png,16,16,tumour\n")
    dataset = RegionFeatures(list_file=tmp_path / "index.csv", class_names=["normal", "tumour"])
    assert dataset.paths == [str(tmp_path / "b.npy")]
    assert dataset.labels.tolist() == [1]


def test_a_grid_that_is_not_square(tmp_path):
    array = features(n=24)
    np.save(tmp_path / "region.npy", array)
    np.testing.assert_array_equal(RegionFeatures(tmp_path, grid=[4, 6]).features(0), grid_of(array, 4))
    with pytest.raises(
        UnreadableImageError, match=r"region.npy: 24 patches are no square: give grid: \[rows, columns\]"
    ):
        RegionFeatures(tmp_path).features(0)
    with pytest.raises(UnreadableImageError, match="region.npy: 24 patches, and grid is 4 x 5"):
        RegionFeatures(tmp_path, grid=[4, 5]).features(0)


def archive_of(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array, **arguments) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **arguments)
    return file.getvalue()


def with_nan() -> np.ndarray:
    array = features()
    array[7, 2] = np.nan
    return array


HUGE = npy(features()).replace(b"(256, 5), }         ", b"(256000000000, 5), }")
BAD_FILES = {
    "empty.npy": (b"", "ValueError|EOFError"),
    "truncated.npy": (npy(features())[:3000], "mmap length is greater than file size"),
    "text.npy": (b"features?", "ValueError: "),
    "zip.npy": (archive_of(a=npy(features())), "ValueError: "),
    "objects.npy": (npy(np.array([{}, {}], object), allow_pickle=True), "ValueError: "),
    "integers.npy": (npy(np.ones((256, 5), np.int64)), "features must be floats, and these are int64"),
    "flat.npy": (npy(np.ones(256, np.float32)), r"features of shape \[256\]: they must be \[patches, width\]"),
    "none.npy": (npy(np.ones((0, 5), np.float32)), "none.npy: "),
    "nan.npy": (npy(with_nan()), "1 of 256 rows hold NaN or infinity"),
    "large.npy": (npy(np.full((256, 5), 1e300)), "256 of 256 rows hold NaN or infinity"),
    "wide.npy": (npy(features(dim=6)), r"features of shape \[256, 6\]: those of the data set are \[256, 5\]"),
    "small.npy": (npy(features(n=225)), r"features of shape \[225, 5\]: those of the data set are \[256, 5\]"),
    "two.npz": (archive_of(a=npy(features()), b=npy(features())), r"must hold one array and has 2 \(a, b\): say which"),
    "no.npz": (archive_of(), r"must hold one array and has 0 \(none\)"),
    "inner.npz": (archive_of(a=npy(features())[:3000]), "ValueError|EOFError"),
    "pickled.npz": (archive_of(a=npy(np.array([{}], object), allow_pickle=True)), "ValueError: "),
    "huge.npz": (archive_of(a=HUGE), "MemoryError|ValueError"),
    "text.npz": (b"features?", "BadZipFile: "),
    "text.pt": (b"features?", "not a file of PyTorch"),
}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_bad_files_are_named(tmp_path, name):
    data, message = BAD_FILES[name]
    np.save(tmp_path / "a.npy", features())
    (tmp_path / name).write_bytes(data)
    dataset = RegionFeatures(tmp_path)
    index = next(i for i in range(len(dataset)) if dataset.describe(i).endswith(name))
    with pytest.raises(UnreadableImageError, match=message) as caught:
        dataset.sample(index, np.random.default_rng(0))
    assert caught.value.path == str(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_one_of_several_arrays(tmp_path, suffix):
    arrays = {"cls": features(1), "mean": features(2)}
    path = tmp_path / f"region{suffix}"
    np.savez(path, **arrays) if suffix == ".npz" else save_torch(arrays, path)
    np.testing.assert_array_equal(RegionFeatures(tmp_path, key="mean").features(0), grid_of(arrays["mean"]))
    with pytest.raises(
        UnreadableImageError, match=r"must hold one array and has 2 \(cls, mean\): say which with 'key'"
    ):
        RegionFeatures(tmp_path).features(0)
    with pytest.raises(UnreadableImageError, match="has no array 'max'; it has cls, mean"):
        RegionFeatures(tmp_path, key="max").features(0)


def test_what_is_in_a_pt_file_is_not_executed(tmp_path):
    import pickle

    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "region.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UnreadableImageError):
        RegionFeatures(tmp_path).features(0)
    assert not (tmp_path / "executed").exists()


def test_a_list_of_other_files(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(UnreadableImageError, match="a.png: features are read from files that end in .npy, .npz, .pt"):
        RegionFeatures(list_file=tmp_path / "list.txt").features(0)


def test_a_file_that_vanished(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", features())
    dataset = RegionFeatures(tmp_path)
    (tmp_path / "b.npy").unlink()
    with pytest.raises(UnreadableImageError, match="b.npy: no such file"):
        dataset.features(1)


def test_unreadable_files_are_replaced_and_reported(tmp_path, caplog):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", features(number))
    np.save(tmp_path / "bad.npy", with_nan())
    loader = Loader(RegionFeatures(tmp_path, transform=RegionMultiCrop()), EpochSampler(4, 4))
    batch = next(iter(loader.iterate(0, 1)))
    assert batch["global_crops"].shape[0] == 8
    assert loader.bad_samples == [(str(tmp_path / "bad.npy"), "1 of 256 rows hold NaN or infinity")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "RegionFeatures needs a root"),
        ({"root": "missing"}, "there is no folder missing"),
        ({"root": ".", "grid": [16]}, r"grid must be \[rows, columns\], each at least 1, not \[16\]"),
        ({"root": ".", "class_names": ["a"]}, "class_names is for a list_file"),
        ({"list_file": "a.csv", "class_folders": True}, "class_folders is for a root alone"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        RegionFeatures(**arguments)


def test_a_folder_without_features(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"contain no feature files \(.npy, .npz, .pt\)"):
        RegionFeatures(tmp_path)
