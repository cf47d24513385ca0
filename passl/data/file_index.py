"""Which files a tree of folders holds: found once, kept small in memory, and kept on disk for the next start.

An index on disk is used as long as no folder of the tree has changed, which its change time tells: it moves when a name
in the folder appears, goes or is replaced, and unlike the modification time nobody can set it back, as `tar` does. So a
start looks at each folder, not at each file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union, overload

import numpy as np
from tqdm import tqdm

from passl.formats.atomic import replacing

logger = logging.getLogger("passl")

_VERSION = 1
# A folder that changed again within the resolution of its file system's clock would keep its change time.
_SURE_AFTER = 2_000_000_000  # nanoseconds
_cache_folder: Optional[Path] = None


class Paths(Sequence[str]):
    """Many paths in little memory, which worker processes share: a string would be copied for its reference count.

    Args:
        folders: each file's folder; "" for names that are whole paths.
        counts: files in each folder.
        names: of all files, folder by folder.
    """

    def __init__(self, folders: Sequence[str], counts: Sequence[int], names: Names) -> None:
        self._folders = Names.of(folders)
        self._ends = np.cumsum(np.asarray(counts, np.int64))
        self._names = names

    @classmethod
    def of(cls, paths: Sequence[str]) -> Paths:
        return cls([""], [len(paths)], Names.of(paths))

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: Union[int, slice]) -> Union[str, list[str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        folder = int(np.searchsorted(self._ends, position, side="right"))
        return os.path.join(self._folders[folder], self._names[position])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other))

    __hash__ = None

    def __repr__(self) -> str:
        shown = ", ".join(repr(path) for path in self[:3])
        return f"Paths({shown}{', ...' if len(self) > 3 else ''}: {len(self)})"


class Names:
    """Strings as one block of bytes. `ends[i]`: where the i-th stops; a zero byte separates it from the next."""

    def __init__(self, block: np.ndarray) -> None:
        self.block = block
        self._ends = np.flatnonzero(block == 0)

    @classmethod
    def of(cls, strings: Sequence[str]) -> Names:
        names = cls(np.frombuffer(b"".join(os.fsencode(text) + b"\0" for text in strings), np.uint8))
        if len(names) != len(strings):
            raise ValueError("a path must not contain a zero byte: " + repr(next(s for s in strings if "\0" in s)))
        return names

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] + 1 if index else 0
        return os.fsdecode(self.block[start : self._ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class FileIndex:
    """The files below `root`, folder by folder.

    Attributes:
        folders: of the tree, relative to `root` ("" is `root` itself), sorted; also those without files.
        counts: int64 [len(folders)], files in each.
        times: int64 [len(folders)], change times in nanoseconds.
        names: of the files, sorted within each folder.
        scanned: when the tree was looked through, nanoseconds.
    """

    root: str
    folders: list[str]
    counts: np.ndarray
    times: np.ndarray
    names: Names
    scanned: int

    def paths(self, order: Optional[Sequence[int]] = None) -> Paths:
        """All files; `order` are positions of folders, to take these alone and in this order."""
        if order is None:
            order = range(len(self.folders))
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        ends = np.concatenate([[-1], np.flatnonzero(self.names.block == 0)])  # of names, as positions in the block
        parts = [self.names.block[ends[starts[i]] + 1 : ends[starts[i + 1]] + 1] for i in order]
        block = np.concatenate([*parts, np.empty(0, np.uint8)]) if list(order) != [*range(len(starts) - 1)] else None
        names = self.names if block is None else Names(block)
        return Paths([os.path.join(self.root, self.folders[i]) for i in order], self.counts[list(order)], names)

    def is_current(self) -> bool:
        """Whether the tree surely holds the same names as when it was scanned."""
        if (self.times > self.scanned - _SURE_AFTER).any():
            return False
        try:
            return all(_time(os.path.join(self.root, name)) == then for name, then in zip(self.folders, self.times))
        except OSError:
            return False


_unsaved: list[tuple[FileIndex, Path]] = []


def keep_in(folder: Optional[Path]) -> None:
    """Take indices from `folder` from now on, and let `save` write new ones there; None: nowhere."""
    global _cache_folder
    _cache_folder = folder
    _unsaved.clear()


def save() -> None:
    """Write the indices that were made since `keep_in`: a run does so once its configuration has proved right."""
    while _unsaved:
        _save(*_unsaved.pop())


def find_files(root: str, extensions: Collection[str]) -> FileIndex:
    """The files below `root` whose lower-case extensions are in `extensions`.

    Names that begin with a dot are left out, with all below them. Links to folders are followed, but for those that
    lead back to a folder on their own way.

    Raises:
        OSError: a folder cannot be read.
    """
    kept = None if _cache_folder is None else _kept_at(_cache_folder, root, extensions)
    if kept is not None and (index := _load(kept, root)) is not None:
        logger.info("%s: %d files in %d folders, by the index %s", root, len(index.names), len(index.folders), kept)
        return index
    index = _scan(root, frozenset(extensions))
    if kept is not None:
        _unsaved.append((index, kept))
    return index


# --- scanning ---


def _scan(root: str, extensions: frozenset[str]) -> FileIndex:
    found: dict[str, tuple[int, list[str]]] = {}
    scanned = time.time_ns()
    with tqdm(unit=" files", desc=f"looking through {root}", delay=2, leave=False, disable=None) as bar:
        for folder, when, names in _walk(root, "", extensions, frozenset()):
            found[folder] = when, names
            bar.update(len(names))
    folders = sorted(found)
    blocks = [os.fsencode("".join(f"{name}\0" for name in sorted(found[folder][1]))) for folder in folders]
    return FileIndex(
        root=root,
        folders=folders,
        counts=np.array([len(found[folder][1]) for folder in folders], np.int64),
        times=np.array([found[folder][0] for folder in folders], np.int64),
        names=Names(np.frombuffer(b"".join(blocks), np.uint8)),
        scanned=scanned,
    )


def _walk(
    root: str, folder: str, extensions: frozenset[str], above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, int, list[str]]]:
    """(folder, its time, names of its files) of `folder` and those below; `above`: what identifies those above it."""
    path = os.path.join(root, folder)
    status = os.stat(path)  # before the names: a change in between makes the index outdated, not wrong
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    names, below = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                below.append(name)
            elif os.path.splitext(name)[1].lower() in extensions:
                names.append(name)
    yield folder, status.st_ctime_ns, names
    for name in below:
        yield from _walk(root, os.path.join(folder, name), extensions, above | {identity})


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where nobody may look: a sample that cannot be read, if it is an image
        return False


def _time(path: str) -> int:
    return os.stat(path).st_ctime_ns


# --- on disk ---


def _kept_at(folder: Path, root: str, extensions: Collection[str]) -> Path:
    identity = json.dumps([_VERSION, os.path.realpath(root), sorted(extensions)])
    return folder / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.npz"


def _save(index: FileIndex, file: Path) -> None:
    arrays = {
        "folders": Names.of(index.folders).block,
        "counts": index.counts,
        "times": index.times,
        "names": index.names.block,
        "scanned": np.int64(index.scanned),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as target:
            np.savez(target, **arrays)
    except OSError as error:
        logger.warning("the index of %s is not kept (%s): the next start looks through it again", index.root, error)


def _load(file: Path, root: str) -> Optional[FileIndex]:
    """The index in `file`; None if there is none, or the tree has changed since."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            folders, names = Names(arrays["folders"]), Names(arrays["names"])
            index = FileIndex(root, list(folders), arrays["counts"], arrays["times"], names, int(arrays["scanned"]))
        whole = len(folders) == len(index.counts) == len(index.times) and index.counts.sum() == len(names)
        if not whole:
            raise ValueError("its parts do not belong together")
    # Damaged bytes raise what zipfile, zlib and numpy raise: there is no narrower common class.
    except Exception as error:
        logger.warning("%s is damaged (%s): looking through %s again", file, error, root)
        return None
    if not index.is_current():
        logger.info("%s has changed since its index was made, or just before: looking through it again", root)
        return None
    return index
