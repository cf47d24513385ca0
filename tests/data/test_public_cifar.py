"""CIFAR from its published formats: the images come out exactly, and nothing in a file is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from passl.data.public.cifar import CIFAR10, CIFAR100, cifar_splits
from passl.data.public.output import Split
from tests.public_archives import CIFAR10_NAMES, Cifar10, Cifar100, python2_pickle, write_tar


def convert(source: Path, out: Path, cifar: Any = CIFAR10, kind: str = "classes") -> dict[str, dict[str, np.ndarray]]:
    """Pixels by path of each split."""
    found = {}
    for name, split in cifar_splits(source, cifar, kind).items():
        Split(out, name, {}).write(split)
        files = sorted((out / name).rglob("*.png"))
        found[name] = {file.relative_to(out / name).as_posix(): np.asarray(Image.open(file)) for file in files}
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, pixels in expected.items():
        np.testing.assert_array_equal(found[name], pixels, err_msg=name)


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        if not name.endswith("/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.smoke
@pytest.mark.parametrize("version", ["pickled", "binary"])
@pytest.mark.parametrize("form", ["archive", "folder", "folder of an archive", "unpacked", "inside"])
def test_cifar10_comes_out_exactly(tmp_path, version, form):
    cifar = Cifar10()
    files = getattr(cifar, version)()
    name = "cifar-10-python.tar.gz" if version == "pickled" else "cifar-10-binary.tar.gz"
    if form in ("archive", "folder of an archive"):
        source = write_tar(tmp_path / name, files, "w:gz")
        source = source if form == "archive" else tmp_path
    else:
        source = unpacked(files, tmp_path / "in")
        inner = next(folder for folder in source.iterdir() if folder.is_dir())
        source = inner if form == "inside" else source
    found = convert(source, tmp_path / "out")
    for split in ("train", "test"):
        assert_same(found[split], cifar.expected(split))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_python_3_are_read_too(tmp_path, protocol):
    cifar = Cifar10()
    for name, images in cifar.images.items():
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        batch = {b"data": rows, b"labels": np.array(cifar.labels[name])}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol))
    found = convert(tmp_path, tmp_path / "out")
    assert_same(found["train"], cifar.expected("train"))


@pytest.mark.parametrize("version", ["pickled", "binary"])
@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_cifar100_has_fine_and_coarse_labels(tmp_path, version, kind):
    cifar = Cifar100()
    source = write_tar(tmp_path / "cifar-100.tar.gz", getattr(cifar, version)(), "w:gz")
    found = convert(source, tmp_path / "out", CIFAR100, kind)
    names, labels = getattr(cifar, f"{kind}_names"), getattr(cifar, kind)
    for split, images in cifar.images.items():
        expected = {f"{names[label]}/{number:05d}.png": images[number] for number, label in enumerate(labels[split])}
        assert_same(found[split], expected)


def test_ready_class_folders_are_copied_as_they_are(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "in" / split / "cat").mkdir(parents=True)
        (tmp_path / "in" / split / "cat" / "1.jpg").write_bytes(b"bytes of an image")
    for name, split in cifar_splits(tmp_path / "in", CIFAR10, "classes").items():
        Split(tmp_path / "out", name, {}).write(split)
    assert (tmp_path / "out" / "train" / "cat" / "1.jpg").read_bytes() == b"bytes of an image"


# --- what is refused ---


class Runs:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.smoke
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_nothing_in_a_pickle_is_executed(tmp_path, protocol):
    files = Cifar10().pickled()
    victim = tmp_path / "executed"
    files["cifar-10-batches-py/data_batch_2"] = pickle.dumps({"data": Runs(victim)}, protocol)
    source = write_tar(tmp_path / "cifar-10-python.tar.gz", files, "w:gz")
    with pytest.raises(ValueError, match="data_batch_2: the file asks for .* which is no part of a file of CIFAR"):
        convert(source, tmp_path / "out")
    assert not victim.exists()
    assert not (tmp_path / "out" / "train").exists()


def test_torch_objects_are_no_part_of_cifar(tmp_path):
    files = Cifar10().pickled()
    files["cifar-10-batches-py/data_batch_1"] = b"\x80\x02ctorch\nSize\n)R."
    source = write_tar(tmp_path / "a.tar.gz", files, "w:gz")
    with pytest.raises(ValueError, match="the file asks for torch.Size"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b", "", ".hidden", "a\0b", "x" * 300])
def test_a_class_cannot_lead_elsewhere(tmp_path, name):
    files = Cifar10().pickled()
    names = [name, *CIFAR10_NAMES[1:]]
    files["cifar-10-batches-py/batches.meta"] = python2_pickle({"label_names": names})
    source = write_tar(tmp_path / "a.tar.gz", files, "w:gz")
    with pytest.raises(ValueError, match="cannot be the name of an image or a class: refused"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": [1]}, r"its data must be numbers \[N, 3072\] of one byte: there are none"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [1]}, r"they are uint8 \[1, 3071\]"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "2 images have 1 labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "it has no list of labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [1]}, "it has data, fine_labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "image 0 has label 10, and there are 10 classes"),
        ([1, 2], "it holds a list, not the dict"),
    ],
)
def test_a_batch_that_makes_no_sense_is_named(tmp_path, batch, message):
    files = Cifar10().pickled()
    files["cifar-10-batches-py/data_batch_3"] = python2_pickle(batch)
    with pytest.raises(ValueError, match=f"data_batch_3: .*{message}"):
        convert(unpacked(files, tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()


def test_a_damaged_archive_is_named(tmp_path):
    source = write_tar(tmp_path / "cifar-10-python.tar.gz", Cifar10().pickled(), "w:gz")
    whole = source.read_bytes()
    for damaged, message in (
        (whole[: len(whole) // 2], "cut off"),
        (whole[:20_000] + bytes([whole[20_000] ^ 255]) + whole[20_001:], "damaged|cut off"),
        (whole[:-6] + bytes([whole[-6] ^ 255]) + whole[-5:], "damaged"),  # gzip's checksum
        (b"<html>", "not a tar archive"),
        (b"", "not a tar archive"),
    ):
        source.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"cifar-10-python.tar.gz: .*({message})"):
            cifar_splits(source, CIFAR10, "classes")
    with pytest.raises(ValueError, match=r"[^\n]*not a tar archive \(file could not be opened successfully\)$"):
        cifar_splits(source, CIFAR10, "classes")


def test_a_missing_batch_is_an_error(tmp_path):
    files = Cifar10().pickled()
    del files["cifar-10-batches-py/data_batch_4"]
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete: data_batch_4 missing"):
        cifar_splits(unpacked(files, tmp_path), CIFAR10, "classes")


def test_a_truncated_binary_batch_is_named(tmp_path):
    files = Cifar10().binary()
    files["cifar-10-batches-bin/test_batch.bin"] += b"x"
    with pytest.raises(ValueError, match=r"test_batch.bin: truncated, or not of this data set: 12293 bytes"):
        convert(unpacked(files, tmp_path / "in"), tmp_path / "out")


def test_other_data_are_recognised(tmp_path):
    source = write_tar(tmp_path / "cifar-100-python.tar.gz", Cifar100().pickled(), "w:gz")
    with pytest.raises(FileNotFoundError, match="nothing of cifar10 is there: give cifar-10-python.tar.gz"):
        cifar_splits(source, CIFAR10, "classes")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        cifar_splits(tmp_path / "nowhere", CIFAR10, "classes")
