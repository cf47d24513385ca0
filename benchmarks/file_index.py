"""How long a data set of many files takes to start, and how much memory its list of files takes.

    python benchmarks/file_index.py                      a million files in 1,000 folders
    python benchmarks/file_index.py --files 20000 --folder /mnt/scratch

Makes empty files in a temporary folder and removes them. Reported are the seconds until ImageFolder is there: without
an index, with one from an earlier start, and after one folder changed; then the memory of the paths, and what each of
the data-loading workers has for itself after it has looked up every path. The list of strings that the index replaces
is measured beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from passl.data.datasets import ImageFolder
from passl.data.file_index import cached_in


def make_files(root: Path, files: int, folders: int) -> None:
    for number in range(folders):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for name in range(number, files, folders):
            os.close(os.open(folder / f"n{number:08d}_{name}.JPEG", os.O_CREAT))


def timed_start(root: Path, cache: Path) -> tuple[float, ImageFolder]:
    started = time.perf_counter()
    with cached_in(cache):
        dataset = ImageFolder(root)
    return time.perf_counter() - started, dataset


def private_megabytes() -> float:
    """Memory that this process shares with no other."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith("Private_")]
    return sum(int(line[1]) for line in lines) / 1024


def worker_megabytes(paths: Sequence[str]) -> float:
    """How much the private memory of a forked worker grows when it looks up every path, out of order."""

    def look_up() -> None:
        before = private_megabytes()
        kept = 0
        for start in range(101):
            for index in range(start, len(paths), 101):
                kept += len(paths[index])
        results.put(private_megabytes() - before)

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    worker = context.Process(target=look_up)
    worker.start()
    growth = results.get()
    worker.join()
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1_000)
    parser.add_argument("--folder", help="where to make them; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root, cache = Path(scratch, "data"), Path(scratch, "index")
        make_files(root, options.files, options.folders)
        time.sleep(2.5)  # folders that changed a moment ago are looked through again
        first, _ = timed_start(root, cache)
        again, dataset = timed_start(root, cache)
        (root / "n00000000" / "new.JPEG").touch()
        changed, _ = timed_start(root, cache)
        (file,) = cache.iterdir()
        arrays = dataset.paths._names.data.nbytes + dataset.paths._names.ends.nbytes
        print(f"{options.files} files in {options.folders} folders")
        print(f"first start: {first:.2f} s, next start: {again:.2f} s, after one folder changed: {changed:.2f} s")
        print(f"index: {arrays / 2**20:.0f} MB in memory, {file.stat().st_size / 2**20:.0f} MB on disk")
        if sys.platform.startswith("linux"):
            print(f"memory of each worker: {worker_megabytes(dataset.paths):.1f} MB more", end=", ")
            print(f"with a list of strings: {worker_megabytes(list(dataset.paths)):.1f} MB more")


if __name__ == "__main__":
    main()
