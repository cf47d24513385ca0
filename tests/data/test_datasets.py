"""Folders and lists of images: what is found, in which order, with which labels; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.data.datasets import ImageFolder, ImageList
from passl.data.image_io import UnreadableImageError
from passl.data.transforms import CenterCrop


def write_images(root: Path, *names: str) -> None:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (i, 0, 0)).save(path)


def relative_paths(dataset, root: Path) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in dataset.paths]


@pytest.mark.smoke
def test_image_folder_finds_classes_and_nested_files_in_sorted_order(tmp_path: Path) -> None:
    write_images(tmp_path, "b/2.png", "b/10.PNG", "a/z.jpg", "a/deep/er/1.webp", "c c é/x.tiff")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "._z.jpg").write_text("left behind by another system")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / ".thumbnails").mkdir()
    write_images(tmp_path, "b/.thumbnails/1.png")
    dataset = ImageFolder(tmp_path)
    expected = ["a/z.jpg", "a/deep/er/1.webp", "b/10.PNG", "b/2.png", "c c é/x.tiff"]
    assert relative_paths(dataset, tmp_path) == expected
    assert dataset.class_names == ["a", "b", "c c é"]
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2]
    assert dataset.labels.dtype == np.int64
    assert len(dataset) == 5


def test_a_sample_has_image_index_and_label(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/1.png")
    dataset = ImageFolder(tmp_path, transform=CenterCrop(4))
    sample = dataset.sample(1, np.random.default_rng(0))
    assert sample.keys() == {"image", "index", "label"}
    assert (sample["index"], sample["label"]) == (1, 1)
    assert sample["image"].size == (4, 4)
    assert dataset.load(1).size == (8, 6)


def test_a_transform_may_return_several_arrays(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    dataset = ImageList(tmp_path, transform=lambda image, rng: {"global_crops": np.zeros(2), "noise": rng.random()})
    sample = dataset.sample(0, np.random.default_rng(5))
    assert sample.keys() == {"global_crops", "noise", "index"}
    assert sample["noise"] == np.random.default_rng(5).random()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], FileNotFoundError, "contains no class folders"),
        (["a/1.png", "stray.png"], ValueError, "'stray.png'"),
        (["stray.png"], ValueError, "use 'name: ImageList' with the same root"),
        (["a/1.png", "empty/"], FileNotFoundError, "no images in the class folder(s) empty"),
        (["a/1.png"] + [f"e{i:02d}/" for i in range(12)], FileNotFoundError, "e08, e09 and 2 more"),
    ],
)
def test_image_folder_refuses(tmp_path: Path, names: list[str], error: type, message: str) -> None:
    write_images(tmp_path, *(name for name in names if not name.endswith("/")))
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
    with pytest.raises(error) as raised:
        ImageFolder(tmp_path)
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("dataset", [ImageFolder, ImageList])
def test_a_missing_root_is_named(tmp_path: Path, dataset) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        dataset(tmp_path / "nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_folders_that_may_not_be_read_are_errors(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "a/secret/2.png")
    (tmp_path / "a" / "secret").chmod(0)
    try:
        with pytest.raises(PermissionError):
            ImageFolder(tmp_path)
    finally:
        (tmp_path / "a" / "secret").chmod(0o700)


@pytest.mark.smoke
def test_image_list_of_a_folder_is_flat_or_nested_and_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, "2.png", "1.png", "sub/a.jpg", "sub/deeper/b.bmp")
    dataset = ImageList(tmp_path)
    assert relative_paths(dataset, tmp_path) == ["1.png", "2.png", "sub/a.jpg", "sub/deeper/b.bmp"]
    assert dataset.labels is None
    assert dataset.class_names == []
    assert dataset.sample(0, np.random.default_rng(0)).keys() == {"image", "index"}


def test_image_list_of_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="contains no images"):
        ImageList(tmp_path)


def test_text_file_of_paths(tmp_path: Path) -> None:
    write_images(tmp_path, "lists/one image.png", "elsewhere/é.png")
    absolute = tmp_path / "elsewhere" / "é.png"
    list_file = tmp_path / "lists" / "all.txt"
    list_file.write_text(f"\ufeffone image.png\r\n\n{absolute}\n../elsewhere/é.png", encoding="utf-8")
    dataset = ImageList(list_file=list_file)
    assert len(dataset) == 3
    assert dataset.labels is None
    assert [dataset.load(i).size for i in range(3)] == [(8, 6)] * 3


def test_an_explicit_root_replaces_the_folder_of_the_list(tmp_path: Path) -> None:
    write_images(tmp_path, "images/1.png")
    list_file = tmp_path / "list.txt"
    list_file.write_text("1.png\n")
    dataset = ImageList(root=tmp_path / "images", list_file=list_file)
    assert relative_paths(dataset, tmp_path) == ["images/1.png"]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("content", "labels", "class_names"),
    [
        ("path,label\na.png,2\nb.png,0\n", [2, 0], []),
        ("path,label\na.png,20250101\nb.png,0\n", [20250101, 0], []),
        ("label, path ,more\ndog,a.png,1\ncat, b.png ,2\n", [1, 0], ["cat", "dog"]),
        ('path,label\n"a, b.png","big dog"\r\nb.png,7up\n', [1, 0], ["7up", "big dog"]),
        ("path\na.png\nb.png\n", None, []),
    ],
)
def test_csv_with_and_without_labels(tmp_path: Path, content: str, labels, class_names: list[str]) -> None:
    list_file = tmp_path / "list.csv"
    list_file.write_text(content)
    dataset = ImageList(list_file=list_file)
    assert (None if dataset.labels is None else dataset.labels.tolist()) == labels
    assert dataset.class_names == class_names
    assert Path(dataset.paths[1]) == tmp_path / "b.png"


def test_class_names_fix_the_numbering(tmp_path: Path) -> None:
    list_file = tmp_path / "list.csv"
    list_file.write_text("path,label\na.png,dog\n")
    dataset = ImageList(list_file=list_file, class_names=["zebra", "dog", "cat"])
    assert dataset.labels.tolist() == [1]
    assert dataset.class_names == ["zebra", "dog", "cat"]
    with pytest.raises(ValueError, match="label 'dog' is not in class_names. Did you mean 'dogs'?"):
        ImageList(list_file=list_file, class_names=["cats", "dogs"])


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("", ["line 1: the header must name the columns 'path'"]),
        ("a.png,1\n", ["line 1: the header must name the columns 'path'", "'a.png,1'"]),
        ("path,label\na.png,0\nb.png\n,1\n", ["line 3: no label", "line 4: no path"]),
        ("path,label\na.png,0,extra\n", ["line 2: more fields than the 2 columns"]),
        ('path,label\n"a.png,0\n', ["line 2: unexpected end of data"]),
        ("path,label\na.png,-1\n", ["labels must be whole numbers from 0 to", "or names, not -1"]),
        ("path,label\na.png,1\nb.png,9223372036854775808\n", ["from 0 to 9223372036854775807 or", "854775808"]),
        ("path,label\n" + "a.png\n" * 15, ["line 11: no label", "and 5 more"]),
    ],
)
def test_malformed_csv_lines_are_named_by_number(tmp_path: Path, content: str, messages: list[str]) -> None:
    list_file = tmp_path / "list.csv"
    list_file.write_text(content)
    with pytest.raises(ValueError) as error:
        ImageList(list_file=list_file)
    assert all(message in str(error.value) for message in [*messages, str(list_file)])


@pytest.mark.parametrize(
    ("arguments", "content", "error", "message"),
    [
        ({}, None, ValueError, "needs a root .* a list_file, or both"),
        ({"list_file": "list.txt"}, None, FileNotFoundError, "there is no file .*list.txt"),
        ({"list_file": "list.txt"}, b"\n \n", FileNotFoundError, "lists no images"),
        ({"list_file": "list.csv"}, b"path,label\n", FileNotFoundError, "lists no images"),
        ({"list_file": "list.txt"}, b"\xff\xfe", ValueError, "is not UTF-8 text"),
        ({"list_file": "list.txt", "class_names": ["a"]}, b"a.png", ValueError, "there are no labels"),
        ({"list_file": "list.txt", "max_bad_samples": -1}, b"a.png", ValueError, "max_bad_samples must be"),
    ],
)
def test_image_list_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict, content, error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(arguments["list_file"]).write_bytes(content)
    with pytest.raises(error, match=message):
        ImageList(**arguments)


def test_a_listed_file_that_is_missing_is_found_out_when_it_is_loaded(tmp_path: Path) -> None:
    list_file = tmp_path / "list.txt"
    list_file.write_text("gone.png")
    with pytest.raises(UnreadableImageError, match=r"gone\.png: no such file"):
        ImageList(list_file=list_file).load(0)


def test_importing_the_package_does_not_import_paddle() -> None:
    code = "import sys, passl.data, passl.data.loader, passl.data.demo; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
