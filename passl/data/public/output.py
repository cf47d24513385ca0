"""A split of a data set as class folders or as a tarball: whole or not at all, and going on where it was stopped.

While it is made, a split has another name (`train.partial`), and beside it lies a journal (`train.journal`). The next
run goes on behind the last unit that the journal says is finished. Once all are there the split gets its name; the
journal stays, and tells later runs how many images there should be.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from tqdm import tqdm

from passl.data.public.journal import Journal
from passl.data.public.names import checked_name
from passl.data.public.sinks import FolderSink, TarSink

_VERSION = 1  # To be raised when the same settings write other files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PublicImage(NamedTuple):
    """One image of a source: its class, the name of its file, and its bytes, or the file that has them."""

    class_name: str
    name: str
    content: Union[bytes, Path]


@dataclass(frozen=True)
class Unit:
    """What is converted as a whole.

    Attributes:
        images: called with the number of the images before it.
        finished: called when the unit is on the disk.
    """

    name: str
    images: Callable[[int], Iterator[PublicImage]]
    finished: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class SplitSource:
    """Where a split comes from.

    Attributes:
        origin: tells it from another source of the same split.
        units: in the order in which they are converted.
        needed: bytes that the split takes on the disk, about.
        part: in words, if it is not all of the published split.
    """

    origin: str
    units: Sequence[Unit]
    needed: int = 0
    part: str = ""


class SplitReport(NamedTuple):
    """What there is of a split; `classes`: their names, sorted; `part`: see `SplitSource`; `was_complete`: before."""

    path: Path
    images: int
    classes: list[str]
    part: str
    was_complete: bool


class Split:
    """The place of one split: the folder `out/train`, or `out/train_dataset.tar`, which `TarDataset` looks for.

    Args:
        settings: what the content depends on besides its source: the data set, the kind of labels.
        images: how many the published split has, for the progress bar.
        as_tar: write a tarball, not folders.
        link: "copy", "hard" or "symbolic": how images that are files already get into folders.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        settings: dict[str, Any],
        images: Optional[int] = None,
        as_tar: bool = False,
        link: str = "copy",
    ) -> None:
        self.name = name
        self.path = out / (f"{name}_dataset.tar" if as_tar else name)
        self._settings = {**settings, "version": _VERSION}
        self._images, self._as_tar, self._link = images, as_tar, link
        self._partial = out / f"{self.path.name}.partial"
        self._journal = Journal(out / f"{self.path.name}.journal")

    def complete(self) -> Optional[SplitReport]:
        """What was written before, or None if there is something to do.

        Raises:
            FileExistsError: there is something else, or the same data set with other settings.
            ValueError: images were removed or added since.
        """
        if not self.path.exists():
            return None
        start, end = self._journal.start, self._journal.end
        if start is None or end is None:
            raise FileExistsError(
                f"{self.path} is there already, and this command did not write it: use it as it is, delete it, or "
                "choose another --out"
            )
        if start["settings"] != self._settings:
            raise FileExistsError(
                f"{self.path} was written with {_described(start['settings'])}, not {_described(self._settings)}: "
                "delete it, or choose another --out"
            )
        self._check_count(end)
        return self._report(was_complete=True)

    def write(self, source: SplitSource) -> SplitReport:
        """Convert what is missing.

        Raises:
            OSError: the disk is full; what is there is kept for the next run.
            ValueError: the source is damaged or hostile; also see :meth:`complete`.
        """
        with self._journal.alone():
            found = self.complete()
            if found:
                return found
            if not self._is_only_unnamed():
                self._convert(source)
            # The journal first: a split with its name and without a last line would not be known as ours.
            os.replace(self._partial, self.path)
        return self._report(was_complete=False)

    def _report(self, was_complete: bool) -> SplitReport:
        classes = sorted({name for entry in self._journal.units.values() for name in entry["classes"]})
        return SplitReport(self.path, self._journal.end["images"], classes, self._journal.start["part"], was_complete)

    def _is_only_unnamed(self) -> bool:
        """Whether the last run was stopped between its last line in the journal and the split's name."""
        start, end = self._journal.start, self._journal.end
        return bool(start and end and start["settings"] == self._settings and self._partial.exists())

    def _convert(self, source: SplitSource) -> None:
        units = [unit.name for unit in source.units]
        if len(set(units)) < len(units):  # the journal knows them by name, so a second one would be left out
            twice = next(name for name in units if units.count(name) > 1)
            raise ValueError(f"{source.origin}: {twice} is there twice")
        start = {"settings": self._settings, "origin": source.origin, "part": source.part, "units": units}
        if self._journal.start != start or self._journal.end or not self._partial.exists():
            self._remove_partial()
            _check_room(self.path, source.needed)
            self._journal.begin(start)
        try:
            self._write_units(source)
        except OSError as error:
            if error.errno in _FULL:
                raise OSError(
                    error.errno,
                    f"{error.strerror}; what is written is kept: make room and type the same command again, it goes on",
                    str(self._partial),
                ) from None
            raise

    def _write_units(self, source: SplitSource) -> None:
        done = self._journal.units
        images = sum(entry["images"] for entry in done.values())
        classes = {name for entry in done.values() for name in entry["classes"]}
        sink = TarSink(self._partial) if self._as_tar else FolderSink(self._partial, self._link)
        sink.start(max((entry["position"] for entry in done.values()), default=0))
        try:
            with tqdm(total=self._images, initial=images, unit="image", desc=self.name, disable=None) as bar:
                for unit in source.units:
                    if unit.name in done:
                        continue
                    written, new = self._write_unit(unit, images, sink, bar)
                    position = sink.position()
                    entry = {"images": written, "classes": sorted(new - classes), "position": position}
                    self._journal.add({"unit": unit.name, **entry})
                    unit.finished()
                    images += written
                    classes |= new
            if not images:
                raise ValueError(f"{source.origin}: no images for {self.name}")
            sink.finish()
        finally:
            sink.close()
        end = {"images": images, "bytes": self._partial.stat().st_size}
        self._check_count(end)
        self._journal.add({"complete": end})

    def _write_unit(self, unit: Unit, before: int, sink: Union[FolderSink, TarSink], bar: tqdm) -> tuple[int, set[str]]:
        seen: set[tuple[str, str]] = set()
        for image in unit.images(before):
            class_name, name = checked_name(image.class_name, unit.name), checked_name(image.name, unit.name)
            if (class_name, name) in seen:
                raise ValueError(f"{unit.name}: two images are named {class_name}/{name}")
            seen.add((class_name, name))
            sink.write(class_name, name, image.content)
            bar.update()
        return len(seen), {class_name for class_name, _ in seen}

    def _remove_partial(self) -> None:
        if self._partial.is_dir():
            shutil.rmtree(self._partial)
        else:
            self._partial.unlink(missing_ok=True)

    def _check_count(self, end: dict[str, int]) -> None:
        path = self.path if self.path.exists() else self._partial
        if self._as_tar:
            size = path.stat().st_size
            if size != end["bytes"]:
                raise ValueError(
                    f"{path} has {size} bytes, and was written with {end['bytes']}: delete it to write it again"
                )
            return
        images = sum(len(os.listdir(folder)) for folder in os.scandir(path) if folder.is_dir())
        if images != end["images"]:
            raise ValueError(
                f"{path} has {images} images, and {end['images']} were written to it: delete it to write it again"
            )


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _check_room(path: Path, needed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"there is no room for it: about {_gigabytes(needed)} are needed, {_gigabytes(free)} are free",
            str(path),
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
