"""Looking for images that cannot be decoded, and for those that occur twice, in tarballs and folders."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional, Union

import numpy as np

from passl.data.datasets import ImageList
from passl.data.image_io import ImageSource, UnreadableImageError, read_source
from passl.data.tar_members import DIRECTORY, FILE, PositionalFile, TarError, TarWalk, printable
from passl.data.tar_names import NamesBuilder

PathLike = Union[str, os.PathLike]
_CHUNK = 32  # images a task
_TASKS_AHEAD = 4  # for each process
_DIGEST_BYTES = 16


class Image(NamedTuple):
    """Where an image is: `name` in `tarball`, its bytes from `offset`; without a tarball, `name` is a path."""

    tarball: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tarball}!{printable(self.name)} (offset {self.offset})" if self.tarball else printable(self.name)


@dataclass
class CheckReport:
    """What `check_images` found.

    images: all that were looked at. corrupt: number in `images` -> why it cannot be decoded. duplicates: groups of
    numbers of readable images with equal bytes. damage: of tarballs themselves. notes: members without bytes of their
    own, which were left out.
    """

    images: _Images
    corrupt: dict[int, str]
    duplicates: list[list[int]]
    damage: list[str]
    notes: list[str]

    def good_names(self, unique: bool = False) -> Iterator[str]:
        """Names of the readable images, for a `NameList`; `unique`: of equal ones only the first."""
        left_out = set(self.corrupt)
        if unique:
            left_out.update(copy for group in self.duplicates for copy in group[1:])
        for number in range(len(self.images)):
            if number not in left_out:
                name = self.images[number].name
                yield name if "/" in name else f"./{name}"


def check_images(
    paths: Sequence[PathLike],
    num_workers: int = 0,
    progress: Optional[Callable[[int, int], None]] = None,
) -> CheckReport:
    """Decode every file of tarballs and of the tarballs in folders, and every image of folders without a tarball.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        progress: called with the number of images passed and of all, now and then.

    Raises:
        OSError: a path is missing, cannot be read, or is a folder without images; or a process was killed.
    """
    images = _Images()
    damage: list[str] = []
    notes: list[str] = []
    for path in _once(Path(path).expanduser() for path in paths):
        if path.is_dir():
            images.add_folder(path)
            continue
        try:
            images.add_tarball(path, notes)
        except TarError as error:
            damage.append(str(error))
    digests = np.zeros((len(images), _DIGEST_BYTES), np.uint8)
    corrupt: dict[int, str] = {}
    for count, (number, digest, problem) in enumerate(_checked(images, num_workers)):
        digests[number] = np.frombuffer(digest, np.uint8)
        if problem:
            corrupt[number] = problem
        if progress is not None and count % _CHUNK == 0:
            progress(count, len(images))
    if progress is not None:
        progress(len(images), len(images))
    return CheckReport(images, corrupt, _groups(digests, corrupt), damage, notes)


def _once(paths: Iterable[Path]) -> list[Path]:
    """Tarballs and folders without a tarball, each once: twice, all in it would be duplicates."""
    found: dict[Path, Path] = {}
    for path in paths:
        for each in sorted(path.glob("*.tar")) or [path]:
            found.setdefault(each.resolve(), each)
    return list(found.values())


class _Images:
    """Where many images are, in 40 bytes and a name each."""

    def __init__(self) -> None:
        self._tarballs = [""]
        self._rows = array("Q")
        self._builder = NamesBuilder()
        self._names = self._builder.build()

    def __len__(self) -> int:
        return len(self._rows) // 3

    def __getitem__(self, number: int) -> Image:
        if len(self._names) != len(self):
            self._names = self._builder.build()
        tarball, offset, size = self._rows[3 * number : 3 * number + 3]
        return Image(self._tarballs[tarball], self._names[number], offset, size)

    def add_tarball(self, path: Path, notes: list[str]) -> None:
        self._tarballs.append(os.fspath(path))
        for member in TarWalk(path):
            if member.kind == FILE:
                self._add(member.path, member.start, member.size)
            elif member.kind != DIRECTORY:
                notes.append(f"left out: {path}!{printable(member.path)}: a {member.kind}")

    def add_folder(self, path: Path) -> None:
        self._tarballs.append("")
        for name in ImageList(path).paths:
            self._add(name, 0, 0)

    def _add(self, name: str, offset: int, size: int) -> None:
        self._builder.add(len(self), name.encode("utf-8", "surrogatepass"))
        self._rows.extend((len(self._tarballs) - 1, offset, size))


# --- decoding -------------------------------------------------------------------------------------------------------


def _checked(images: _Images, num_workers: int) -> Iterator[tuple[int, bytes, str]]:
    """Number, digest of the bytes, and problem (or "") of each image, in order."""
    chunks = (
        [(number, images[number]) for number in range(start, min(start + _CHUNK, len(images)))]
        for start in range(0, len(images), _CHUNK)
    )
    if num_workers < 1:
        for chunk in chunks:
            yield from _check_chunk(chunk)
        return
    # Not forks: progress bars have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        waiting: deque = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_check_chunk, chunk))
                if len(waiting) > _TASKS_AHEAD * num_workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that decoded images was killed, or crashed: not enough memory? --num_workers 0 decodes in "
                "one process, and its progress shows where"
            ) from error


def _check_chunk(chunk: list[tuple[int, Image]]) -> list[tuple[int, bytes, str]]:
    return [(number, *_check(image)) for number, image in chunk]


def _check(image: Image) -> tuple[bytes, str]:
    data = b""
    try:
        data = _file(image.tarball).read(image.offset, image.size) if image.tarball else read_source(image.name).data
        ImageSource(image.name, data).rgb()
        problem = ""
    except UnreadableImageError as error:
        problem = error.reason
    except (OSError, MemoryError) as error:
        problem = f"{type(error).__name__}: {error}"
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest(), problem


@functools.lru_cache(maxsize=64)
def _file(path: str) -> PositionalFile:
    return PositionalFile(path)


def _groups(digests: np.ndarray, corrupt: dict[int, str]) -> list[list[int]]:
    """Numbers of equal digests [N, 16], corrupt ones aside; groups in the order of their first."""
    keys = digests.view(np.uint64)
    order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
    same = np.concatenate([[False], (keys[order][1:] == keys[order][:-1]).all(axis=1), [False]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(same) == 1), np.flatnonzero(np.diff(same) == -1)
    groups = [order[start : end + 1].tolist() for start, end in zip(starts, ends)]
    readable = [[number for number in group if number not in corrupt] for group in groups]
    return sorted(group for group in readable if len(group) > 1)
