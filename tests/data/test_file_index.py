"""The list of a folder's files: what it holds, when it is used again, and what happens when its file is bad."""

from __future__ import annotations

import logging
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from passl.data import file_index
from passl.data.datasets import ImageFolder, ImageList
from passl.data.file_index import Paths, cached_in, find_images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("b/2.png", "b/10.PNG", "a/z.jpg", "a/deep/1.webp", "a b/x.png", "é/\udcff.png"):
        add(tmp_path / "data", name)
    return tmp_path / "data"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were read, in order."""
    folders: list[str] = []
    read = file_index._Scan._read

    def noting(self, folder: str):
        folders.append(folder)
        return read(self, folder)

    monkeypatch.setattr(file_index._Scan, "_read", noting)
    # Folders of a test are made a moment before: they would all be looked through again.
    monkeypatch.setattr(file_index, "_RACY_NS", -(10**18))
    return folders


def add(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def listed(root: Path, cache: Path, by_class: bool = False) -> list[str]:
    with cached_in(cache):
        return [os.path.relpath(path, root) for path in find_images(str(root), by_class).paths()]


# --- paths ---


def test_paths_are_a_sequence_like_a_list() -> None:
    strings = ["/a/1.png", "/a/é.png", "b", "c\udcff"]
    paths = Paths.of(strings)
    assert list(paths) == strings
    assert paths == strings
    assert strings == paths
    assert paths != strings[:-1]
    assert (len(paths), paths[1], paths[-1], paths[1:3]) == (4, strings[1], strings[-1], strings[1:3])
    assert paths.index("b") == 2
    assert pickle.loads(pickle.dumps(paths)) == strings
    with pytest.raises(IndexError):
        paths[4]
    assert Paths.of([]) == []


def test_a_million_paths_take_little_more_than_their_names(tmp_path: Path) -> None:
    names = [f"n01440764_{number}.JPEG" for number in range(2000)]
    for name in names:
        add(tmp_path, f"n01440764/{name}")
    size = len(pickle.dumps(find_images(str(tmp_path)).paths()))
    assert size < sum(map(len, names)) + 8 * len(names) + 2000


@pytest.mark.smoke
def test_order_by_path_and_by_class(root: Path, tmp_path: Path) -> None:
    by_path = ["a/z.jpg", "a b/x.png", "a/deep/1.webp", "b/10.PNG", "b/2.png", "é/\udcff.png"]
    by_class = ["a/z.jpg", "a/deep/1.webp", "a b/x.png", "b/10.PNG", "b/2.png", "é/\udcff.png"]
    for _ in range(2):
        assert listed(root, tmp_path / "cache") == by_path
        assert listed(root, tmp_path / "cache", by_class=True) == by_class


# --- when it is used again ---


@pytest.mark.smoke
def test_an_unchanged_folder_is_not_read_again(root: Path, tmp_path: Path, scanned: list[str]) -> None:
    first = listed(root, tmp_path / "cache")
    assert sorted(scanned) == ["", "a", "a b", "a/deep", "b", "é"]
    scanned.clear()
    assert listed(root, tmp_path / "cache") == first
    assert scanned == []


def _change(root: Path, kind: str) -> None:
    if kind == "a new file":
        add(root, "b/3.png")
    elif kind == "a removed file":
        (root / "b" / "2.png").unlink()
    elif kind == "a renamed file":
        (root / "b" / "2.png").rename(root / "b" / "4.png")
    elif kind == "a new folder":
        add(root, "a/new/er/1.png")
    elif kind == "a removed folder":
        (root / "a" / "deep" / "1.webp").unlink()
        (root / "a" / "deep").rmdir()
    elif kind == "a renamed class":
        (root / "b").rename(root / "c")
    elif kind == "time stamps set back":
        before = (root / "b").stat().st_mtime_ns
        add(root, "b/3.png")
        os.utime(root / "b", ns=(before, before))


KINDS = (
    "a new file",
    "a removed file",
    "a renamed file",
    "a new folder",
    "a removed folder",
    "a renamed class",
    "time stamps set back",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_class", [True, False])
def test_changes_are_seen(root: Path, tmp_path: Path, scanned: list[str], kind: str, by_class: bool) -> None:
    before = listed(root, tmp_path / "cache", by_class)
    time.sleep(0.02)  # of the clock that stamps folders
    _change(root, kind)
    scanned.clear()
    after = listed(root, tmp_path / "cache", by_class)
    assert after == [os.path.relpath(path, root) for path in find_images(str(root), by_class).paths()]
    assert after != before
    scanned.clear()
    assert listed(root, tmp_path / "cache", by_class) == after
    assert scanned == []


def test_only_the_changed_folders_are_read(root: Path, tmp_path: Path, scanned: list[str]) -> None:
    listed(root, tmp_path / "cache")
    time.sleep(0.02)
    add(root, "b/new/1.png")
    scanned.clear()
    listed(root, tmp_path / "cache")
    assert sorted(scanned) == ["b", "b/new"]


def test_folders_that_changed_a_moment_ago_are_read_again(root: Path, tmp_path: Path, monkeypatch) -> None:
    """A change within the same tick of the clock leaves no trace."""
    reads: list[str] = []
    read = file_index._Scan._read
    monkeypatch.setattr(file_index._Scan, "_read", lambda self, folder: reads.append(folder) or read(self, folder))
    for _ in range(2):
        reads.clear()
        listed(root, tmp_path / "cache")
        assert len(reads) == 6


def test_links_that_begin_or_cease_to_lead_to_folders(root: Path, tmp_path: Path, scanned: list[str]) -> None:
    elsewhere = tmp_path / "disk"
    (root / "linked").symlink_to(elsewhere)
    before = listed(root, tmp_path / "cache")
    add(elsewhere, "1.png")
    assert listed(root, tmp_path / "cache") == sorted([*before, "linked/1.png"], key=os.path.split)
    (elsewhere / "1.png").unlink()
    elsewhere.rmdir()
    assert listed(root, tmp_path / "cache") == before


def test_cycles_of_links_end(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = listed(root, tmp_path / "cache")
    (root / "a" / "up").symlink_to("..")
    (root / "b" / "self").symlink_to(".")
    (root / "a" / "deep" / "far").symlink_to(root, target_is_directory=True)
    with caplog.at_level(logging.WARNING, logger="passl"):
        assert listed(root, tmp_path / "cache") == expected
    assert f"{root / 'a' / 'up'} leads back to a folder above it" in caplog.text
    assert ImageFolder(root).class_names == ["a", "a b", "b", "é"]


# --- its file ---


def _spoil(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = content.index(b"2.png")
        file.write_bytes(content[:middle] + b"\xff" + content[middle + 1 :])
    elif kind == "foreign":
        np.savez(file, other=np.zeros(3))
    elif kind == "pickled":
        np.savez(file, version=np.array([print], dtype=object))
    elif kind == "inconsistent":
        with np.load(file) as arrays:
            kept = dict(arrays)
        np.savez(file, **{**kept, "ends": kept["ends"] + 5})


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "foreign", "pickled", "inconsistent"])
def test_a_file_that_is_bad_is_made_anew(root: Path, tmp_path: Path, scanned: list[str], caplog, kind: str) -> None:
    first = listed(root, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    _spoil(file, kind)
    with caplog.at_level(logging.WARNING, logger="passl"):
        assert listed(root, tmp_path / "cache") == first
    assert f"{file} cannot be used" in caplog.text
    scanned.clear()
    assert listed(root, tmp_path / "cache") == first
    assert scanned == []


def test_a_folder_that_cannot_be_written_to_is_a_message(root: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING, logger="passl"):
        assert len(listed(root, tmp_path / "cache")) == 6
    assert "is not kept for the next start" in caplog.text


def test_nothing_is_written_after_an_error_or_by_readers(root: Path, tmp_path: Path) -> None:
    def failing() -> None:
        with cached_in(tmp_path / "cache"):
            find_images(str(root))
            raise KeyError("a mistake in the configuration")

    with pytest.raises(KeyError):
        failing()
    with cached_in(tmp_path / "cache", write=False):
        find_images(str(root))
    find_images(str(root))
    assert not (tmp_path / "cache").exists()


def test_data_sets_take_their_files_from_it(root: Path, tmp_path: Path, scanned: list[str]) -> None:
    def both() -> tuple[ImageFolder, ImageList]:
        with cached_in(tmp_path / "cache"):
            return ImageFolder(root), ImageList(root)

    first = both()
    scanned.clear()
    again = both()
    assert scanned == []
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for before, after in zip(first, again):
        assert list(after.paths) == list(before.paths)
        assert after.class_names == before.class_names
    assert again[0].labels.tolist() == [0, 0, 1, 2, 2, 3]


def test_links_to_nowhere_in_the_root_are_no_images_of_a_class(root: Path) -> None:
    (root / "gone.png").symlink_to("nowhere.png")
    dataset = ImageFolder(root)
    assert len(dataset) == len(dataset.labels) == 6
    assert not any("gone" in path for path in dataset.paths)


def test_a_long_search_tells_how_far_it_is(root: Path, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_index, "_SECONDS_BETWEEN_MESSAGES", 0.0)
    with caplog.at_level(logging.INFO, logger="passl"):
        find_images(str(root))
    assert f"looking for images in {root}: 6 so far, in 6 folders" in caplog.text
