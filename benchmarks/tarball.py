"""Reading images out of a tarball beside reading the same images as files, and the time to index a tarball.

    python benchmarks/tarball.py

Reading: `TarDataset.read` against `ImageList.read` for the same images in the same random order, in turns, with all of
them in the page cache, so that what is measured is the work and not the disk. Reported: medians of the rounds, in
microseconds an image, and the ratio. Target: at most 1.2.

Indexing: `passl-data tar-index`'s function on a tarball of --members small files, and on one of a tenth, each in a
process of its own: seconds, and peak memory above that of the imports. Beside it Python's `tarfile`, listing only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

PEAK = """
# Not ru_maxrss, which a process inherits. Elsewhere than on Linux there is none.
def peak():
    try:
        lines = open("/proc/self/status").read().split("\\n")
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
"""
INDEX = """
import sys, time
from passl.data.image_io import image_extensions
from passl.data.tar_index import index_tarball
image_extensions()
imports, start = peak(), time.perf_counter()
index_tarball(sys.argv[1], sys.argv[2], force=True)
print(time.perf_counter() - start, peak() - imports)
"""
TARFILE = """
import sys, tarfile, time
imports, start = peak(), time.perf_counter()
with tarfile.open(sys.argv[1], "r:") as tar:
    [(member.offset_data, member.size) for member in tar if member.isfile()]
print(time.perf_counter() - start, peak() - imports)
"""


def write_tarball(path: Path, names: list[str], contents: list[bytes]) -> None:
    """A tarball of files; contents are used in turn."""
    with path.open("wb") as file:
        for number, name in enumerate(names):
            data = contents[number % len(contents)]
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def reading(folder: Path, count: int, size: int, rounds: int) -> tuple[float, float]:
    """Seconds an image from files and from a tarball, of `count` images of about `size` bytes."""
    from passl.data.datasets import ImageList
    from passl.data.tar_dataset import TarDataset
    from passl.data.tar_index import index_tarball

    rng = np.random.default_rng(0)
    names = [f"images/{number % 40:02d}/{number:06d}.jpg" for number in range(count)]
    contents = [rng.bytes(int(size * rng.uniform(0.5, 1.5))) for _ in names]
    for name, data in zip(names, contents):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tarball = folder / "pretrain_dataset.tar"
    files = ImageList(folder / "images")
    names = [str(Path(path).relative_to(folder)) for path in files.paths]
    write_tarball(tarball, names, [(folder / name).read_bytes() for name in names])
    index_tarball(tarball, folder)
    tar = TarDataset(folder)
    for index in range(count):  # which fills the cache
        if files.read(index).data != tar.read(index).data:
            raise RuntimeError(f"image {index} differs")
    order = rng.permutation(count).tolist()
    seconds: dict[str, list[float]] = {"files": [], "tarball": []}
    for _ in range(rounds):
        for name, dataset in (("files", files), ("tarball", tar)):
            start = time.perf_counter()
            for index in order:
                dataset.read(index)
            seconds[name].append((time.perf_counter() - start) / count)
    return median(seconds["files"]), median(seconds["tarball"])


def indexing(folder: Path, members: int) -> None:
    """Print time and memory for a tarball of that many members."""
    path = folder / f"{members}.tar"
    names = [f"images/{number // 1000:04d}/image_{number:08d}.jpg" for number in range(members)]
    write_tarball(path, names, [b"." * 700])
    for name, code in (("passl", INDEX), ("tarfile, listing only", TARFILE)):
        command = [sys.executable, "-c", PEAK + code, str(path), str(folder / "index")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, megabytes = map(float, done.stdout.split())
        print(f"{members:>9} members  {name:<22}{seconds:>7.2f} s  {megabytes:>6.1f} MB")
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="images to read (default: 2000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of reading them all (default: 7)")
    parser.add_argument("--members", type=int, default=100_000, help="files to index (default: 100000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'microseconds an image':<24}{'files':>8}{'tarball':>9}{'ratio':>7}")
        for name, size in (("photos of 110 kB", 110_000), ("patches of 5 kB", 5_000)):
            files, tar = reading(Path(folder) / name, options.images, size, options.rounds)
            print(f"{name:<24}{1e6 * files:>8.1f}{1e6 * tar:>9.1f}{tar / files:>7.2f}")
        for members in (options.members // 10, options.members):
            indexing(Path(folder), members)


if __name__ == "__main__":
    main()
