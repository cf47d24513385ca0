"""Images read through a tarball's index: recorded ones, all layouts of files, workers, and tarballs that changed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from passl.data.image_io import UnreadableImageError
from passl.data.loader import EpochSampler, Loader
from passl.data.multi_crop import MultiCrop
from passl.data.tar_dataset import TarDataset
from passl.data.tar_index import index_tarball, join_indices
from passl.data.tar_lists import CsvLabels, FolderLabels, NameList
from passl.data.tar_members import TarError
from passl.formats.limits import CheckpointFormatError, RefusedGlobalError
from tests.data.tarballs import END, header, image_bytes, member, write_tarball

VIEWS = functools.partial(MultiCrop, 8, 6, num_local_crops=2)


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with a tarball of seven images in two folders, and its index."""
    files = {f"{'ab'[i % 2]}/{i // 2}.png": image_bytes(i) for i in range(7)}
    write_tarball(tmp_path / "pretrain_dataset.tar", files)
    index_tarball(tmp_path / "pretrain_dataset.tar", tmp_path)
    return tmp_path


def bytes_of(dataset: TarDataset) -> list[bytes]:
    return [dataset.read(index).data for index in range(len(dataset))]


# --- recordings -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_recorded_tarballs_read_back_exactly(reference):
    folder = reference / "tarball"
    recordings = json.loads((folder / "expected.json").read_text())
    read = 0
    for key, expected in recordings.items():
        if "rows" not in expected:
            continue
        root, _, part = key.partition("_")
        dataset = TarDataset(folder / root, **({} if not part else {"prefix" if root == "knn" else "suffix": part}))
        assert len(dataset) == len(expected["rows"])
        for row in expected["rows"]:
            assert_recorded(dataset, row)
        if "class_ids" in expected:
            assert dataset.labels.dtype == np.int64
            assert dataset.labels.tolist() == [int(row["target"]) for row in expected["rows"]]
            for label, name in expected["class_ids"]:
                assert dataset.class_names[label] == name
        else:
            assert dataset.labels is None
        read += 1
    assert read


def assert_recorded(dataset: TarDataset, row: dict) -> None:
    source = dataset.read(row["index"])
    tarball, _, path = source.name.partition("!")
    assert Path(tarball).is_file()
    assert path.rpartition("/")[2] == row["filename"]
    assert len(source.data) == row["nbytes"]
    assert hashlib.sha256(source.data).hexdigest() == row["sha256_bytes"]
    if "sha256_decoded_rgb" not in row:  # it records the official error
        with pytest.raises(UnreadableImageError, match=row["filename"]):
            dataset.load(row["index"])
        return
    pixels = np.asarray(dataset.load(row["index"]))
    assert list(pixels.shape) == row["shape"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == row["sha256_decoded_rgb"]


def test_index_of_the_older_script_that_numbers_files_from_1(reference, tmp_path):
    folder = reference / "tarball"
    everything = json.loads((folder / "expected.json").read_text())
    for key in [key for key in everything if "_entries_by_script_" in key]:
        cohort, recorded = key.partition("_entries_by_script_")[0], everything[key]
        if not isinstance(recorded, dict):
            continue
        np.save(tmp_path / "entries.npy", np.array(recorded["entries"], np.uint64))
        np.save(tmp_path / "file_indices.npy", {int(i): name for i, name in recorded["file_indices"].items()})
        dataset = TarDataset(tmp_path, tarball=folder / "foundation" / f"{cohort}.tar")
        for index, (_, number, start, end) in enumerate(recorded["entries"]):
            assert dataset.describe(index).endswith("/" + recorded["file_indices"][str(number)])
            assert len(dataset.read(index).data) == end - start


# --- layouts --------------------------------------------------------------------------------------------------------


def test_files_may_have_their_prefix_or_not(root):
    expected = bytes_of(TarDataset(root))
    os.rename(root / "pretrain_file_indices.npy", root / "file_indices.npy")
    assert bytes_of(TarDataset(str(root))) == expected
    os.rename(root / "pretrain_entries.npy", root / "entries.npy")
    os.rename(root / "pretrain_dataset.tar", root / "dataset.tar")
    assert bytes_of(TarDataset(root)) == bytes_of(TarDataset(root, prefix=None)) == expected
    os.rename(root / "dataset.tar", root / "any name.tar")
    assert bytes_of(TarDataset(root)) == expected
    (root / "elsewhere").mkdir()
    os.rename(root / "any name.tar", root / "elsewhere" / "x.tar")
    assert bytes_of(TarDataset(root, tarball="elsewhere/x.tar")) == expected
    assert bytes_of(TarDataset(root, tarball=root / "elsewhere/x.tar")) == expected
    with pytest.raises(FileNotFoundError, match="has no test_entries.npy"):
        TarDataset(root, prefix="test")


def test_members_are_described_by_their_path_where_base_names_repeat(root, tmp_path):
    tarball = root / "pretrain_dataset.tar"
    assert TarDataset(root).describe(1) == f"{tarball}!b/0.png"
    assert TarDataset(root).describe(-1) == f"{tarball}!a/3.png"
    with pytest.raises(IndexError):
        TarDataset(root).describe(7)
    long = "long/" * 30 + "l" * 120 + ".png"
    write_tarball(tmp_path / "y/y.tar", {long: image_bytes(1), "raw\udcff.png": image_bytes(2)})
    index_tarball(tmp_path / "y/y.tar", tmp_path / "y", prefix="y")
    dataset = TarDataset(tmp_path / "y", prefix="y")
    assert dataset.describe(0) == f"{tmp_path}/y/y.tar!{'l' * 120}.png"
    assert dataset.describe(1) == f"{tmp_path}/y/y.tar!raw\\udcff.png"


def test_several_roots_follow_each_other(root, tmp_path):
    second = tmp_path / "second"
    write_tarball(second / "more.tar", {"more.png": image_bytes(100)})
    index_tarball(second / "more.tar", second)
    dataset = TarDataset([root, second])
    assert bytes_of(dataset) == bytes_of(TarDataset(root)) + bytes_of(TarDataset(second))
    assert dataset.describe(7) == f"{second}/more.tar!more.png"
    dataset = TarDataset([second, root], tarball=["more.tar", "pretrain_dataset.tar"])
    assert bytes_of(dataset) == bytes_of(TarDataset(second)) + bytes_of(TarDataset(root))
    with pytest.raises(ValueError, match=r"a tarball for each root or none: 2 root\(s\), 1 tarball\(s\)"):
        TarDataset([root, second], tarball="more.tar")


def test_labels_are_those_of_the_index_if_it_has_classes(root, tmp_path):
    assert TarDataset(root).labels is None
    assert TarDataset(root, labels=True).labels.tolist() == [0] * 7
    assert TarDataset(root, labels=True).class_names == []
    tarball = root / "pretrain_dataset.tar"
    index_tarball(tarball, root, "train", labels=FolderLabels())
    dataset = TarDataset(root, prefix="train")
    assert dataset.labels.tolist() == [0, 1] * 3 + [0]
    assert dataset.class_names == ["a", "b"]
    assert TarDataset(root, prefix="train", labels=False).labels is None
    # class-ids.npy is of all indices in the folder, and those for pre-training have no labels.
    assert TarDataset(root).labels is None
    only = tmp_path / "only.txt"
    only.write_text("b/0.png\n")
    (tmp_path / "x.csv").write_text("filename,label,class\nb/0.png,3,three\n")
    index_tarball(tarball, tmp_path / "x", keep=NameList(only), labels=CsvLabels(tmp_path / "x.csv"))
    dataset = TarDataset(tmp_path / "x", tarball=tarball)
    assert dataset.labels.tolist() == [3]
    assert dataset.class_names == ["class_0", "class_1", "class_2", "three"]


# --- in a loader ----------------------------------------------------------------------------------------------------


def batches_of(dataset: TarDataset, num_workers: int) -> list[dict]:
    loader = Loader(dataset, EpochSampler(len(dataset), 3, seed=1), num_workers=num_workers, seed=1)
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in loader.iterate(0, 6)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Paddle has workers on Linux only")
def test_workers_read_the_same_through_files_opened_before_the_fork(root):
    dataset = TarDataset(root, transform=VIEWS())
    dataset.read(0)
    expected = batches_of(dataset, 0)
    for found, batch in zip(batches_of(dataset, 2), expected):
        assert found.keys() == batch.keys()
        for name in batch:
            assert np.array_equal(found[name], batch[name]), name


def test_a_pickled_data_set_opens_its_tarball_again(root):
    dataset = TarDataset(root)
    expected = bytes_of(dataset)
    assert bytes_of(pickle.loads(pickle.dumps(dataset))) == expected


def test_members_that_are_no_images_are_reported_and_replaced(root, tmp_path, caplog):
    files = {"a.png": image_bytes(0), "sub/notes.txt": b"text", "empty.png": b"", "b.png": image_bytes(1)}
    write_tarball(tmp_path / "y/y.tar", files)
    index_tarball(tmp_path / "y/y.tar", tmp_path / "y")
    dataset = TarDataset(tmp_path / "y", transform=VIEWS(), max_bad_samples=2)
    loader = Loader(dataset, EpochSampler(4, 4))
    batch = next(loader.iterate())
    assert set(batch["index"].tolist()) == {0, 3}
    assert dict(loader.bad_samples) == {
        f"{tmp_path}/y/y.tar!sub/notes.txt": "not an image that Pillow can identify",
        f"{tmp_path}/y/y.tar!empty.png": "the file is empty (0 bytes)",
    }
    assert "y.tar!sub/notes.txt: not an image" in caplog.text


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_a_missing_index_says_how_to_write_it(root, tmp_path):
    command = f"passl-data tar-index --tarball_path {root}/pretrain_dataset.tar --output_root {root}"
    os.remove(root / "pretrain_entries.npy")
    with pytest.raises(FileNotFoundError, match=f"has no pretrain_entries.npy; write the index with: {command}$"):
        TarDataset(root)
    with pytest.raises(FileNotFoundError, match=f"{command} --prefix test --restrict LIST --suffix fold0$"):
        TarDataset(root, prefix="test", suffix="fold0")
    index_tarball(root / "pretrain_dataset.tar", root)
    os.remove(root / "pretrain_file_indices.npy")
    with pytest.raises(FileNotFoundError, match=f"has no pretrain_file_indices.npy; write the index with: {command}$"):
        TarDataset(root)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        TarDataset(tmp_path / "nowhere")


def test_a_missing_tarball_is_named(root):
    tarball = root / "pretrain_dataset.tar"
    for name in ("one.tar", "two.tar"):
        (root / name).write_bytes(tarball.read_bytes())
    os.remove(tarball)
    names = "pretrain_dataset.tar or pretrain.tar or dataset.tar"
    with pytest.raises(FileNotFoundError, match=f"has no {names}: set tarball to one of one.tar, two.tar$"):
        TarDataset(root)
    with pytest.raises(FileNotFoundError, match="there is no tarball .*three.tar"):
        TarDataset(root, tarball="three.tar")
    os.remove(root / "one.tar")
    os.rename(root / "two.tar", root / "pretrain_dataset.tar.gz")
    with pytest.raises(FileNotFoundError, match="pretrain_dataset.tar.gz is compressed: uncompress it"):
        TarDataset(root)


def test_a_tarball_that_changed_since_it_was_indexed_is_noticed(root):
    tarball = root / "pretrain_dataset.tar"
    whole = tarball.read_bytes()
    problem = "is not the tarball that .*pretrain_entries.npy is the index of, or was changed or cut off since then"
    tarball.write_bytes(whole[:5000])
    with pytest.raises(TarError, match=rf"{problem} \('2.png' is at offset \d+ .. \d+, and the file ends at 5000\)"):
        TarDataset(root)
    other = {f"{i}.png": image_bytes(i, (14 + i, 9)) for i in range(20)}
    write_tarball(tarball, other)
    with pytest.raises(TarError, match=rf"{problem} \('\d.png' does not start at offset \d+\): copy it"):
        TarDataset(root)


def test_a_tarball_cut_off_while_it_is_read(root):
    dataset = TarDataset(root)
    dataset.read(0)
    os.truncate(root / "pretrain_dataset.tar", 600)
    reason = "pretrain_dataset.tar!a/0.png: the tarball ends within it, 88 bytes behind offset 512"
    with pytest.raises(UnreadableImageError, match=reason):
        dataset.read(0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (np.zeros((3, 3), np.uint64), r"is no index of a tarball: it has uint64 \[3, 3\]"),
        (np.zeros((3, 4)), r"is no index of a tarball: it has float64 \[3, 4\], and should have uint64 \[N, 4\]"),
        (np.zeros((0, 4), np.uint64), "has no entries"),
        (np.array([[0, 0, 900, 800]], np.uint64), "is damaged: it has offsets that make no sense"),
        (np.array([[0, 0, -5, 800]], np.int64).astype(np.uint64), "is damaged: it has offsets that make no sense"),
        (np.array([[0, -1, 512, 700]]), "is damaged: it has offsets that make no sense"),
        (
            np.array([[0, 99, 512, 700]], np.uint64),
            "has files that the file indices of .*.tar do not name",
        ),
        (np.array([[0, "a.jpg", 0, 1]], object), "is no index of a tarball: "),
    ],
)
def test_entries_that_are_none(root, entries, message):
    np.save(root / "pretrain_entries.npy", entries)
    with pytest.raises(TarError, match=f"pretrain_entries.npy {message}"):
        TarDataset(root)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\1\0\4\0{'a(", b"\x93NUMPY\1\0\4\0{09}"])
def test_entries_without_a_readable_header(root, damage):
    (root / "pretrain_entries.npy").write_bytes(damage)
    with pytest.raises(TarError, match="pretrain_entries.npy is no index of a tarball: "):
        TarDataset(root)


def test_each_tarball_of_an_index_over_several_must_be_there(tmp_path):
    for name in "ab":
        write_tarball(tmp_path / f"{name}.tar", {f"{name}.png": image_bytes(0)})
        index_tarball(tmp_path / f"{name}.tar", tmp_path, prefix=name)
    join_indices(tmp_path, ["a.tar", "b.tar"])
    (tmp_path / "b.tar").unlink()  # a.tar, the only one left, would fit
    with pytest.raises(FileNotFoundError, match="has no b.tar, which pretrain_entries.npy has images of"):
        TarDataset(tmp_path)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_names_are_refused_and_not_executed(root):
    mark = root / "executed"
    for value in ({0: Hostile(mark)}, Hostile(mark)):
        np.save(root / "pretrain_file_indices.npy", np.array(value, object))
        with pytest.raises(RefusedGlobalError, match="pretrain_file_indices.npy: the file asks for posix.mkdir"):
            TarDataset(root)
    np.save(root / "class-ids.npy", np.array([[0, Hostile(mark)]], object))
    index_tarball(root / "pretrain_dataset.tar", root, force=True)
    with pytest.raises(RefusedGlobalError, match=r"class-ids.npy: the file asks for posix.mkdir"):
        TarDataset(root)
    assert not mark.exists()


def test_an_index_over_several_tarballs_needs_their_names(reference, tmp_path):
    for path in (reference / "tarball/foundation").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cohort_indices.npy").unlink()
    with pytest.raises(FileNotFoundError, match="has entries of several tarballs, and no cohort_indices.npy"):
        TarDataset(tmp_path)
    np.save(tmp_path / "cohort_indices.npy", {0: "cohortA"})
    with pytest.raises(TarError, match="cohort_indices.npy does not name tarball 1, which the entries have"):
        TarDataset(tmp_path)
    np.save(tmp_path / "cohort_indices.npy", ["cohortA", "cohortB"])
    with pytest.raises(CheckpointFormatError, match="cohort_indices.npy is no index of a tarball|array of <U7"):
        TarDataset(tmp_path)


def test_images_beyond_8_gib(tmp_path):
    path, image = tmp_path / "dataset.tar", image_bytes(1)
    with path.open("wb") as file:
        file.write(header("huge.bin", 9 << 30))
        file.seek(9 << 30, 1)
        file.write(member("a.png", image) + END)
    (tmp_path / "huge.txt").write_text("huge.bin\n")
    index_tarball(path, tmp_path, remove=NameList(tmp_path / "huge.txt"))
    assert TarDataset(tmp_path).read(0).data == image
