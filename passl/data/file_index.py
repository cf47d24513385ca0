"""Which image files a folder holds: found once, kept in a small file, and looked for again only where it changed.

Names are kept as one block of bytes: a million of them take tens of megabytes, which forked workers share.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union, overload

import numpy as np

from passl.data.image_io import image_extensions
from passl.formats.atomic import replacing

logger = logging.getLogger("passl")

_VERSION = 1
_RACY_NS = 2 * 10**9  # coarsest time stamps of common file systems
_SECONDS_BETWEEN_MESSAGES = 10.0
_UNKNOWN = (-1, -1)  # a stamp that no folder has


class Strings(Sequence[str]):
    """Names of a file system, packed: uint8 `data` and int64 `ends` [N]."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def pack(cls, strings: Sequence[str]) -> Strings:
        encoded = [os.fsencode(string) for string in strings]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), lengths.cumsum())

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.data[start : self.ends[index]].tobytes())

    def part(self, start: int, stop: int) -> Strings:
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1]) if stop else 0
        return Strings(self.data[first:last], self.ends[start:stop] - first)


class Paths(Sequence[str]):
    """The paths of files, as a sequence of strings that takes little more memory than their names.

    Args:
        names: of all files, folder by folder.
        folders: the path that precedes the names of each folder.
        ends: int64, for each folder, where its names end in `names`.
    """

    def __init__(self, names: Strings, folders: Strings, ends: np.ndarray) -> None:
        self._names = names
        self._folders = folders
        self._ends = ends

    @classmethod
    def of(cls, paths: Sequence[str]) -> Paths:
        """Any paths."""
        return cls(Strings.pack(paths), Strings.pack([""]), np.array([len(paths)]))

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: Union[int, slice]) -> Union[str, list[str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # negative ones count from the end, others raise IndexError
        folder = int(np.searchsorted(self._ends, position, side="right"))
        return os.path.join(self._folders[folder], self._names[position])

    def __iter__(self) -> Iterator[str]:
        start = 0
        for folder, end in zip(self._folders, self._ends.tolist()):
            for position in range(start, end):
                yield os.path.join(folder, self._names[position])
            start = end

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, (Paths, list)):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:2]))
        return f"<{len(self)} paths: {shown}{', ...' if len(self) > 2 else ''}>"


@dataclass
class FileIndex:
    """The image files below a folder.

    Attributes:
        root: the folder, as it was given.
        folders: F of them, relative to `root` and with "/" between, without the hidden ones; the first, "", is `root`.
        stamps: int64 [F, 2], when each folder changed; -1: it must be looked through again.
        ends: int64 [F], where the names of each folder end in `names`.
        names: of the image files, folder by folder, each sorted.
        links: symbolic links, relative to `root`, that lead nowhere; they may become folders without another trace.
    """

    root: str
    folders: Strings
    stamps: np.ndarray
    ends: np.ndarray
    names: Strings
    links: Strings

    def paths(self) -> Paths:
        """In the order of the index."""
        folders = Strings.pack([os.path.join(self.root, folder) for folder in self.folders])
        return Paths(self.names, folders, self.ends)

    def names_in(self, folder: int) -> Strings:
        return self.names.part(int(self.ends[folder - 1]) if folder else 0, int(self.ends[folder]))


def find_images(root: str, by_class: bool = False) -> FileIndex:
    """The image files below `root`, through symbolic links too.

    Folders are sorted by their paths or, with `by_class`, by their first part (the class) and then by their paths.
    Inside `cached_in` the result of an earlier run is used, and only folders that changed since are looked through.

    Raises:
        OSError: a folder cannot be read.
    """
    cache = _cache.get()
    old = None if cache is None else cache.get(root, by_class)
    started = time.monotonic()
    scan = _Scan(root, old)
    try:
        scan.run()
    except OSError:
        if old is None:
            raise
        scan = _Scan(root, None)  # what a symbolic link led to may be gone
        scan.run()
    if old is not None and not scan.num_read:
        return old
    index = scan.index(by_class)
    seconds = time.monotonic() - started
    if seconds > 1:
        logger.info("found %d images in %d folders of %s in %.1f s", len(index.names), len(index.ends), root, seconds)
    if cache is not None:
        cache.put(root, by_class, index)
    return index


# --- looking through folders ---


class _Scan:
    """One walk through the folders below `root`; those that `old` knows unchanged are not read."""

    def __init__(self, root: str, old: Optional[FileIndex]) -> None:
        self.root = root
        self.old = old
        self.num_read = 0
        self.links: list[str] = []
        self._found: dict[str, tuple[tuple[int, int], Strings]] = {}  # folder -> stamp, names
        self._num_names = 0
        self._known = {} if old is None else {folder: number for number, folder in enumerate(old.folders)}
        self._known_children = _children(self._known)
        self._known_links = _children(() if old is None else old.links)
        self._next_message = time.monotonic() + _SECONDS_BETWEEN_MESSAGES

    def run(self) -> None:
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
        while waiting:
            folder, above = waiting.pop()
            status = os.stat(self._path(folder))
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                logger.warning("%s leads back to a folder above it: left out", self._path(folder))
                continue
            # The first stamp is what changes with the entries, but unpacking and copying programs set it back.
            children = self._visit(folder, (status.st_mtime_ns, status.st_ctime_ns))
            waiting += [(child, (*above, identity)) for child in children]

    def _path(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else self.root

    def _visit(self, folder: str, stamp: tuple[int, int]) -> list[str]:
        """Note the names in `folder`; returns the folders in it."""
        number = self._known.get(folder)
        links = self._known_links.get(folder, [])
        # A link back to a folder above it is no folder of the index, and so not a known child.
        if (
            number is not None
            and tuple(self.old.stamps[number].tolist()) == stamp
            and not any(os.path.isdir(self._path(link)) for link in links)
        ):
            self._found[folder] = stamp, self.old.names_in(number)
            self.links += links
            return self._known_children.get(folder, [])
        self.num_read += 1
        # One that changed just now may change again without a new stamp: look once more the next time.
        settled = time.time_ns() - max(stamp) > _RACY_NS
        children, names = self._read(folder)
        self._found[folder] = stamp if settled else _UNKNOWN, Strings.pack(sorted(names))
        self._report(len(names))
        return children

    def _read(self, folder: str) -> tuple[list[str], list[str]]:
        """-> folders, relative to the root, and names of images"""
        prefix = f"{folder}/" if folder else ""
        extensions = image_extensions()
        children, names = [], []
        with os.scandir(self._path(folder)) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir():
                    children.append(prefix + name)
                elif os.path.splitext(name)[1].lower() in extensions:
                    names.append(name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self.links.append(prefix + name)
        return children, names

    def _report(self, count: int) -> None:
        self._num_names += count
        now = time.monotonic()
        if now >= self._next_message:
            self._next_message = now + _SECONDS_BETWEEN_MESSAGES
            logger.info(
                "looking for images in %s: %d so far, in %d folders", self.root, self._num_names, len(self._found)
            )

    def index(self, by_class: bool) -> FileIndex:
        folders = sorted(self._found, key=(lambda folder: (folder.partition("/")[0], folder)) if by_class else None)
        parts = [self._found[folder][1] for folder in folders]
        counts = np.array([len(part) for part in parts], np.int64)
        sizes = np.array([len(part.data) for part in parts], np.int64)
        name_ends = np.concatenate([part.ends for part in parts]) + np.repeat(sizes.cumsum() - sizes, counts)
        return FileIndex(
            root=self.root,
            folders=Strings.pack(folders),
            stamps=np.array([self._found[folder][0] for folder in folders], np.int64),
            ends=counts.cumsum(),
            names=Strings(np.concatenate([part.data for part in parts]), name_ends),
            links=Strings.pack(sorted(self.links)),
        )


def _children(paths: Iterable[str]) -> dict[str, list[str]]:
    """`paths` by the folders they are in."""
    children: dict[str, list[str]] = {}
    for path in paths:
        if path:
            children.setdefault(os.path.dirname(path), []).append(path)
    return children


# --- what is kept of it ---


class _Cache:
    """The indexes of a run, by file: those in `folder`, and those found meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._indexes: dict[Path, FileIndex] = {}
        self._new: set[Path] = set()

    def _file(self, root: str, by_class: bool) -> Path:
        key = f"{by_class} {os.path.abspath(root)}"
        return self.folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.npz"

    def get(self, root: str, by_class: bool) -> Optional[FileIndex]:
        """None: there is none, or it cannot be used, which the log says."""
        file = self._file(root, by_class)
        if file not in self._indexes and file.is_file():
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    index = _from_arrays(root, arrays)
            # Of damaged archives and headers numpy and zipfile raise ValueError, BadZipFile, EOFError, KeyError,
            # MemoryError, SyntaxError ...: there is no narrower common class.
            except Exception as error:
                logger.warning("%s cannot be used (%s): looking through %s again", file, error, root)
                return None
            if index is not None:
                self._indexes[file] = index
        return self._indexes.get(file)

    def put(self, root: str, by_class: bool, index: FileIndex) -> None:
        file = self._file(root, by_class)
        self._indexes[file] = index
        self._new.add(file)

    def write(self) -> None:
        for file in sorted(self._new):
            index = self._indexes[file]
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(file) as target:
                    np.savez(target, **_to_arrays(index))
            except OSError as error:
                logger.warning("the list of files in %s is not kept for the next start: %s", index.root, error)


_cache: contextvars.ContextVar[Optional[_Cache]] = contextvars.ContextVar("_cache", default=None)


@contextlib.contextmanager
def cached_in(folder: Path, write: bool = True) -> Iterator[None]:
    """What data sets find inside this context is kept in `folder`, and read from there when nothing changed.

    Args:
        write: False only reads. Nothing is written, and `folder` not made, before the context ends without an error.
    """
    cache = _Cache(folder)
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)
    if write:
        cache.write()


_PACKED = ("folders", "names", "links")


def _to_arrays(index: FileIndex) -> dict[str, np.ndarray]:
    return {
        "version": np.array(_VERSION),
        "about": np.frombuffer(_about(index.root), np.uint8),
        "stamps": index.stamps,
        "ends": index.ends,
        **{f"{name}_data": getattr(index, name).data for name in _PACKED},
        **{f"{name}_ends": getattr(index, name).ends for name in _PACKED},
    }


def _about(root: str) -> bytes:
    """What must be the same for an index to say the same."""
    return os.fsencode("\n".join([os.path.abspath(root), *sorted(image_extensions())]))


def _from_arrays(root: str, arrays: Any) -> Optional[FileIndex]:
    """Raises ValueError or KeyError for what `_to_arrays` cannot have made; None if it is of another set of formats."""
    if int(arrays["version"]) != _VERSION or arrays["about"].tobytes() != _about(root):
        return None
    packed = {name: _strings(arrays[f"{name}_data"], arrays[f"{name}_ends"]) for name in _PACKED}
    index = FileIndex(root=root, stamps=arrays["stamps"], ends=arrays["ends"], **packed)
    if index.stamps.dtype != np.int64 or index.stamps.shape != (len(index.folders), 2):
        raise ValueError(f"its stamps are {index.stamps.dtype}{list(index.stamps.shape)}")
    if not _are_ends(index.ends, len(index.names)) or len(index.ends) != len(index.folders) or index.folders[0] != "":
        raise ValueError("its folders and names do not fit together")
    return index


def _strings(data: np.ndarray, ends: np.ndarray) -> Strings:
    if data.dtype != np.uint8 or data.ndim != 1 or not _are_ends(ends, len(data)):
        raise ValueError("its names are damaged")
    return Strings(data, ends)


def _are_ends(ends: np.ndarray, total: int) -> bool:
    if ends.dtype != np.int64 or ends.ndim != 1:
        return False
    if not len(ends):
        return total == 0
    return bool(ends[0] >= 0 and ends[-1] == total and (np.diff(ends) >= 0).all())
