"""How long a data set of many files takes to start, and how much memory its list of files takes.

    python benchmarks/file_index.py                      a million files in 1,000 folders
    python benchmarks/file_index.py --files 20000 --folder /mnt/scratch

Makes empty files in a temporary folder and removes them. Reported are the seconds until ImageFolder is there: without
an index, with one from an earlier start, and after one folder changed; those until two workers have delivered the first
batch of a shuffled epoch (which costs no decoding here), without the import of Paddle; then the memory of the paths,
and what a forked worker has for itself after it has looked up every path. The list of strings that the index replaces
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

import numpy as np

import passl.data.workers  # noqa: F401  (imports Paddle, whose seconds are not those of the data)
from passl.data.datasets import ImageFolder
from passl.data.file_index import cached_in
from passl.data.image_io import ImageSource
from passl.data.loader import EpochSampler, Loader


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


class Blank:
    """Decodes nothing: the files are empty."""

    takes_source = True

    def __call__(self, source: ImageSource, rng: np.random.Generator) -> np.ndarray:
        return np.zeros((3, 8, 8), np.float32)


def seconds_to_first_batch(dataset: ImageFolder) -> float:
    dataset.transform = Blank()
    started = time.perf_counter()
    batches = Loader(dataset, EpochSampler(len(dataset), 64), num_workers=2).iterate()
    next(batches)
    seconds = time.perf_counter() - started
    batches.close()
    return seconds


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
            print(f"first batch: after {seconds_to_first_batch(dataset):.2f} s more")
            print(f"memory of each worker: {worker_megabytes(dataset.paths):.1f} MB more", end=", ")
            print(f"with a list of strings: {worker_megabytes(list(dataset.paths)):.1f} MB more")


if __name__ == "__main__":
    main()
