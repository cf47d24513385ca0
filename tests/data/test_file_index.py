"""The index of a tree of files: complete, small, and used again only while nothing has changed."""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.data import file_index
from passl.data.datasets import ImageFolder
from passl.data.file_index import FileIndex, Paths

PNG = frozenset({".png"})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("b/2.png", "b/1.PNG", "a/x/3.png", "a b/4.png", "a/0.png", "a/notes.txt", "a/.hidden.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name, "png")
    return root


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(file_index, "_SURE_AFTER", 0)  # the clock here is fine enough
    time.sleep(0.02)
    file_index.keep_in(tmp_path / "index")
    yield tmp_path / "index"
    file_index.keep_in(None)


def find_files(root: str, extensions: set[str]) -> FileIndex:
    index = file_index.find_files(root, extensions)
    file_index.save()
    return index


def names(root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in find_files(str(root), PNG).paths()]


@pytest.mark.smoke
def test_order_is_by_folder_then_name_and_by_class_first_for_classes(tree):
    assert names(tree) == ["a/0.png", "a b/4.png", "a/x/3.png", "b/1.PNG", "b/2.png"]
    folder = ImageFolder(tree)
    assert [os.path.relpath(path, tree) for path in folder.paths] == [
        "a/0.png", "a/x/3.png", "a b/4.png", "b/1.PNG", "b/2.png",
    ]  # fmt: skip
    assert folder.class_names == ["a", "a b", "b"]
    assert folder.labels.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.smoke
def test_second_start_reads_no_folder(tree, kept, monkeypatch):
    first = names(tree)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(os, "scandir", lambda path: pytest.fail(f"looked through {path}"))
    assert names(tree) == first


@pytest.mark.smoke
@pytest.mark.parametrize(
    "change",
    [
        lambda root: Image.new("RGB", (4, 4)).save(root / "b/3.png"),
        lambda root: (root / "b/2.png").unlink(),
        lambda root: (root / "b/2.png").rename(root / "b/9.png"),
        lambda root: (root / "c").mkdir(),
        lambda root: (root / "a/x").rename(root / "a/y"),
        lambda root: [file.unlink() for file in (root / "a b").iterdir()] and (root / "a b").rmdir(),
    ],
    ids=["new file", "file gone", "file renamed", "new folder", "folder renamed", "folder gone"],
)
def test_a_change_makes_it_outdated(tree, kept, change):
    find_files(str(tree), PNG)
    change(tree)
    index = find_files(str(tree), PNG)
    expected = sorted((str(p.parent.relative_to(tree)), p.name) for p in tree.rglob("*") if p.suffix.lower() == ".png")
    found = [os.path.split(os.path.relpath(path, tree)) for path in index.paths()]
    assert sorted(found) == [pair for pair in expected if not pair[1].startswith(".")]
    if "c" in os.listdir(tree):
        assert "c" in index.folders


def test_a_folder_that_changed_just_before_is_not_trusted(tree, kept, monkeypatch):
    monkeypatch.setattr(file_index, "_SURE_AFTER", 2 * 10**9)
    looked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or scandir(path))
    for _ in range(2):
        looked.clear()
        assert len(names(tree)) == 5
        assert looked, "a clock too coarse would not show another change"


def test_a_change_whose_modification_time_was_set_back_is_seen(tree, kept):
    find_files(str(tree), PNG)
    before = os.stat(tree / "b")
    Image.new("RGB", (4, 4)).save(tree / "b/3.png")
    os.utime(tree / "b", ns=(before.st_atime_ns, before.st_mtime_ns))  # as tar does when it unpacks
    assert "b/3.png" in names(tree)


def test_other_extensions_and_other_roots_have_indices_of_their_own(tree, kept):
    find_files(str(tree), PNG)
    assert [os.path.basename(path) for path in find_files(str(tree), {".txt"}).paths()] == ["notes.txt"]
    assert [os.path.basename(path) for path in find_files(str(tree / "b"), PNG).paths()] == ["1.PNG", "2.png"]


@pytest.mark.parametrize("content", [b"", b"not an index", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_index_is_made_again(tree, kept, caplog, content):
    expected = names(tree)
    (file,) = kept.iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "passl"):
        assert names(tree) == expected
    assert f"{file} is damaged" in caplog.text
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["counts"].sum() == len(expected)


def test_an_index_that_cannot_be_kept_is_a_warning(tree, tmp_path, caplog):
    (tmp_path / "index").write_text("a file where the folder should be")
    file_index.keep_in(tmp_path / "index")
    try:
        with caplog.at_level(logging.WARNING, "passl"):
            assert len(names(tree)) == 5
    finally:
        file_index.keep_in(None)
    assert "is not kept" in caplog.text


def test_links_to_folders_are_followed_but_not_in_circles(tree, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (4, 4)).save(other / "5.png")
    (tree / "c").symlink_to(other)
    (other / "back").symlink_to(tree)
    (tree / "a/up").symlink_to(tree / "a")
    found = names(tree)
    assert "c/5.png" in found
    assert len(found) < 20


def test_a_link_to_itself_is_a_sample_that_cannot_be_read(tree):
    (tree / "b/loop.png").symlink_to("loop.png")
    assert "b/loop.png" in names(tree)


def test_paths_are_a_sequence(tmp_path):
    texts = [f"folder/{i}.png" for i in range(5)] + ["/absolute.png", "nur \udcff bytes.png", ""]
    paths = Paths.of(texts)
    assert paths == texts
    assert texts != paths[:3]
    assert paths[-2] == texts[-2]
    assert paths[1:6:2] == texts[1:6:2]
    assert paths.index("folder/3.png") == 3
    assert pickle.loads(pickle.dumps(paths)) == texts
    assert sorted([*paths, "x"])[-1] == "x"
    with pytest.raises(IndexError):
        paths[len(texts)]
    with pytest.raises(ValueError, match="zero byte"):
        Paths.of(["a\0b"])
