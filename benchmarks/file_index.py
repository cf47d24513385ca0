"""How soon a run on very many files can start: looking through the folders, and the start after that.

    python benchmarks/file_index.py --files 1000000

Makes empty files in a temporary folder (`--folder` names another place) and deletes them at the end.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

from passl.data import file_index
from passl.data.datasets import ImageFolder
from passl.data.loader import EpochSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where to make the files (default: the temporary folder)")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        _make(place / "images", options.files, options.classes)
        file_index.keep_in(place / "index")
        print(f"{options.files} files in {options.classes} folders")
        for title in ("first start: looked through", "second start: by the index"):
            before, started = _memory(), time.perf_counter()
            dataset = ImageFolder(place / "images")
            file_index.save()
            indexed = time.perf_counter() - started
            next(EpochSampler(len(dataset), 256).batches())
            first_batch = time.perf_counter() - started
            print(f"{title} in {indexed:.2f} s, first batch drawn after {first_batch:.2f} s, "
                  f"peak memory + {_memory() - before:.0f} MB")  # fmt: skip
            del dataset
        size = sum(file.stat().st_size for file in (place / "index").iterdir())
        print(f"index on disk: {size / 1e6:.1f} MB")
    finally:
        shutil.rmtree(place)


def _make(root: Path, files: int, classes: int) -> None:
    for label in range(classes):
        folder = root / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(label, files, classes):
            (folder / f"n{label:08d}_{number}.JPEG").touch()
    time.sleep(3)  # an index is not trusted for folders that changed just before


def _memory() -> float:
    """Peak of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
