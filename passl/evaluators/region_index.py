"""`index.csv` of a folder of region features: which files it has, of which images, and the grids of their patches."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from passl import distributed
from passl.data.feature_files import read_features
from passl.data.image_io import UnreadableImageError
from passl.formats.atomic import replacing

_COLUMNS = ("path", "region", "grid_height", "grid_width", "label")


class Region(NamedTuple):
    """One line: the features' file, the image it is of, the rows and columns of its patches, and its class or ""."""

    file: str
    name: str
    rows: int
    columns: int
    label: str


class RegionIndex:
    """Each process notes what it has written in a file of its own; `merge` makes one index of them all.

    So what a stopped run has done is known to the next one, with any number of processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.regions: dict[str, Region] = {}
        for path in self._files():
            self.regions.update({region.file: region for region in _read(path)})
        distributed.barrier()  # nobody writes before all have read

    def has(self, file: str) -> bool:
        """Whether `file` was noted, and is there, whole."""
        region = self.regions.get(file)
        if region is None or not (self.folder / file).is_file():
            return False
        try:
            features = read_features(self.folder / file)
        except UnreadableImageError:
            return False
        return features.ndim == 2 and len(features) == region.rows * region.columns

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[Region], None]]:
        """A function that notes a region at once."""
        with self._journal(distributed.rank()).open("a", encoding="utf-8", newline="") as file:
            file.write("\n")  # a process that was killed may have left half a line

            def note(region: Region) -> None:
                csv.writer(file).writerow(region)
                file.flush()

            yield note

    def merge(self, wanted: Sequence[str]) -> list[Region]:
        """Write `index.csv`: all files that are there, in the order of their paths. To be called by all processes.

        Returns:
            Those of `wanted`.
        """
        distributed.barrier()
        regions = {region.file: region for path in self._files() for region in _read(path)}
        regions = {file: regions[file] for file in sorted(regions) if (self.folder / file).is_file()}
        distributed.barrier()
        if distributed.is_main():
            self._write(list(regions.values()))
            for path in self._files():
                if path.name != "index.csv":
                    path.unlink()
        distributed.barrier()
        return [regions[file] for file in wanted if file in regions]

    def _write(self, regions: Sequence[Region]) -> None:
        # A column with gaps would be refused by the readers of lists.
        count = len(_COLUMNS) if all(region.label for region in regions) else len(_COLUMNS) - 1
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS[:count])
        writer.writerows(region[:count] for region in regions)
        with replacing(self.folder / "index.csv") as file:
            file.write(text.getvalue().encode())

    def _files(self) -> list[Path]:
        whole = self.folder / "index.csv"
        return [path for path in (whole, *sorted(self.folder.glob(".index-*.csv"))) if path.is_file()]

    def _journal(self, rank: int) -> Path:
        return self.folder / f".index-{rank}.csv"


def _read(path: Path) -> Iterator[Region]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            # The header, and the last line of a process that was killed while it wrote it, are none.
            if len(row) in (4, 5) and row[2].isdecimal() and row[3].isdecimal():
                yield Region(row[0], row[1], int(row[2]), int(row[3]), row[4] if len(row) == 5 else "")
