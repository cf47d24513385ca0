"""A split of a public data set: whole or not at all, and going on where it was stopped."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from passl.data.public.journal import Journal
from passl.data.public.output import PublicImage, Split, SplitSource, Unit

SETTINGS = {"data set": "a", "labels": "fine"}


class Source:
    """Three units of two images; can be interrupted at an image, and notes which units were read."""

    def __init__(self, error: Callable[[str], BaseException] = RuntimeError, stop_at: tuple[int, int] = (9, 9)) -> None:
        self.read: list[int] = []
        self.finished: list[int] = []
        self._error, self._stop_at = error, stop_at

    def split(self, origin: str = "here", needed: int = 0) -> SplitSource:
        return SplitSource(origin, [self._unit(number) for number in range(3)], needed)

    def _unit(self, number: int) -> Unit:
        def images(before: int) -> Iterator[PublicImage]:
            self.read.append(number)
            for image in range(2):
                if (number, image) == self._stop_at:
                    raise self._error("stop")
                yield PublicImage(f"class{image}", f"{before + image}.png", f"{number} {image}".encode())

        return Unit(f"unit{number}", images, lambda: self.finished.append(number))


EXPECTED = {
    f"class{image}/{2 * unit + image}.png": f"{unit} {image}".encode() for unit in range(3) for image in range(2)
}


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        with tarfile.open(path) as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*.*")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.smoke
@pytest.mark.parametrize("as_tar", [False, True])
def test_a_split_is_written_once(tmp_path, as_tar):
    source, split = Source(), Split(tmp_path, "train", SETTINGS, as_tar=as_tar)
    assert split.complete() is None
    report = split.write(source.split())
    assert report == (tmp_path / ("train_dataset.tar" if as_tar else "train"), 6, ["class0", "class1"], "", False)
    assert contents(report.path) == EXPECTED
    assert source.finished == [0, 1, 2]
    assert names(tmp_path) == sorted([report.path.name, f"{report.path.name}.journal"])
    again = Split(tmp_path, "train", SETTINGS, as_tar=as_tar)
    assert again.complete() == report._replace(was_complete=True)
    assert again.write(source.split()) == report._replace(was_complete=True)
    assert source.read == [0, 1, 2]


@pytest.mark.parametrize("as_tar", [False, True])
@pytest.mark.parametrize("stop_at", [(0, 0), (0, 1), (1, 1), (2, 1)])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_split_goes_on(tmp_path, as_tar, stop_at, error):
    whole = Split(tmp_path / "whole", "train", SETTINGS, as_tar=as_tar).write(Source().split()).path
    out = tmp_path / "out"
    source = Source(error, stop_at)
    with pytest.raises(error):
        Split(out, "train", SETTINGS, as_tar=as_tar).write(source.split())
    assert not (out / whole.name).exists()
    assert source.finished == list(range(stop_at[0]))
    split = Split(out, "train", SETTINGS, as_tar=as_tar)
    assert split.complete() is None
    source = Source()
    assert split.write(source.split()).images == 6
    assert source.read == list(range(stop_at[0], 3))
    assert contents(out / whole.name) == EXPECTED
    if as_tar:
        assert (out / whole.name).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("as_tar", [False, True])
def test_another_source_starts_anew(tmp_path, as_tar):
    with pytest.raises(RuntimeError):
        Split(tmp_path, "train", SETTINGS, as_tar=as_tar).write(Source(stop_at=(2, 1)).split())
    source = Source()
    report = Split(tmp_path, "train", SETTINGS, as_tar=as_tar).write(source.split(origin="elsewhere"))
    assert source.read == [0, 1, 2]
    assert contents(report.path) == EXPECTED


def test_a_split_that_was_stopped_before_it_had_its_name_gets_it(tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            Split(tmp_path, "train", SETTINGS).write(Source().split())
    assert names(tmp_path) == ["train.journal", "train.partial"]
    source = Source()
    Split(tmp_path, "train", SETTINGS).write(source.split())
    assert source.read == []
    assert contents(tmp_path / "train") == EXPECTED


def test_a_torn_line_of_the_journal_does_not_count(tmp_path):
    with pytest.raises(RuntimeError):
        Split(tmp_path, "train", SETTINGS).write(Source(stop_at=(2, 0)).split())
    journal = tmp_path / "train.journal"
    journal.write_text(journal.read_text()[:-20])
    source = Source()
    Split(tmp_path, "train", SETTINGS).write(source.split())
    assert source.read == [1, 2]
    assert contents(tmp_path / "train") == EXPECTED
    assert Split(tmp_path, "train", SETTINGS).complete().images == 6


def test_what_others_wrote_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileExistsError, match="train is there already, and this command did not write it"):
        Split(tmp_path, "train", SETTINGS).write(Source().split())
    Split(tmp_path / "out", "train", SETTINGS).write(Source().split())
    with pytest.raises(FileExistsError, match="written with data set a, labels fine.* not data set a, labels coarse"):
        Split(tmp_path / "out", "train", {**SETTINGS, "labels": "coarse"}).complete()


@pytest.mark.parametrize("as_tar", [False, True])
def test_a_complete_split_that_was_changed_is_an_error(tmp_path, as_tar):
    path = Split(tmp_path, "train", SETTINGS, as_tar=as_tar).write(Source().split()).path
    if as_tar:
        path.write_bytes(path.read_bytes()[:-512])
    else:
        (path / "class0" / "0.png").unlink()
    with pytest.raises(ValueError, match="delete it to write it again"):
        Split(tmp_path, "train", SETTINGS, as_tar=as_tar).complete()
    if as_tar:
        path.unlink()
    else:
        shutil.rmtree(path)
    split = Split(tmp_path, "train", SETTINGS, as_tar=as_tar)
    assert split.complete() is None
    assert contents(split.write(Source().split()).path) == EXPECTED


@pytest.mark.smoke
@pytest.mark.parametrize("as_tar", [False, True])
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, as_tar):
    source = Source(lambda _: OSError(errno.ENOSPC, "No space left on device"), (1, 1))
    with pytest.raises(OSError, match="No space left on device; what is written is kept: make room and type the same"):
        Split(tmp_path, "train", SETTINGS, as_tar=as_tar).write(source.split())
    assert [name for name in names(tmp_path) if not name.endswith((".partial", ".journal"))] == []
    assert contents(Split(tmp_path, "train", SETTINGS, as_tar=as_tar).write(Source().split()).path) == EXPECTED


def test_room_is_looked_for_before(tmp_path):
    source = Source()
    with pytest.raises(OSError, match=r"there is no room for it: about 1000000.0 GB are needed, [0-9.]+ GB are free"):
        Split(tmp_path, "train", SETTINGS).write(source.split(needed=10**15))
    assert source.read == []


def test_two_processes_exclude_each_other(tmp_path):
    with (tmp_path / "train.journal").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process is writing .*train: wait for its end"):
            Split(tmp_path, "train", SETTINGS).write(Source().split())


def split_of(images: list[PublicImage]) -> SplitSource:
    return SplitSource("here", [Unit("unit", lambda before: iter(images))])


def test_images_of_one_name_are_an_error(tmp_path):
    image = PublicImage("a", "1.png", b"x")
    with pytest.raises(ValueError, match=r"unit: two images are named a/1.png"):
        Split(tmp_path, "train", SETTINGS).write(split_of([image, image]))
    units = [Unit(name, lambda before: iter([image])) for name in ("one", "two")]
    with pytest.raises(ValueError, match="has 1 images, and 2 were written to it"):
        Split(tmp_path, "train", SETTINGS).write(SplitSource("there", units))


def test_units_of_one_name_are_an_error(tmp_path):
    """Two archives of one class in ImageNet's, say: the journal could not tell them apart."""
    unit = Unit("n01440764", lambda before: iter([PublicImage("a", "1.png", b"1")]))
    with pytest.raises(ValueError, match="here: n01440764 is there twice"):
        Split(tmp_path, "train", SETTINGS).write(SplitSource("here", [unit, unit]))
    assert not (tmp_path / "train").exists()


def test_a_unit_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Its source may be deleted then."""
    events = []
    monkeypatch.setattr(os, "sync", lambda: events.append("sync"))
    monkeypatch.setattr(Journal, "add", lambda self, entry: events.append(next(iter(entry))) or self._take(entry))
    Split(tmp_path, "train", SETTINGS).write(Source().split())
    assert events == ["settings", *3 * ["sync", "unit"], "complete"]


def test_a_split_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="here: no images for train"):
        Split(tmp_path, "train", SETTINGS).write(split_of([]))
    assert not (tmp_path / "train").exists()


def test_a_link_is_never_written_through(tmp_path):
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    linked = PublicImage("a", "1.png", mine)

    def stopped(before: int) -> Iterator[PublicImage]:
        yield linked
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Split(tmp_path, "train", SETTINGS, link="hard").write(SplitSource("here", [Unit("unit", stopped)]))
    Split(tmp_path, "train", SETTINGS).write(split_of([PublicImage("a", "1.png", b"other")]))
    assert mine.read_bytes() == b"mine"
    assert (tmp_path / "train/a/1.png").read_bytes() == b"other"
