"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as they are published: pickles of Python 2, or the binary version.

`paddle.vision.datasets` reads the same files with `pickle.load`, which runs whatever a file asks for. Here nothing in
a file is executed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from passl.data.public.archives import read_small_members
from passl.data.public.cifar_names import CIFAR10_NAMES, CIFAR100_COARSE_NAMES, CIFAR100_NAMES
from passl.data.public.folders import class_folder_units
from passl.data.public.names import checked_name
from passl.data.public.output import PublicImage, SplitSource, Unit
from passl.formats.limits import Budget, blaming
from passl.formats.pickle_globals import Globals
from passl.formats.pickle_machine import PickleMachine

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_FILE = 256 << 20  # the training images of CIFAR-100, as Python 3 writes bytes for Python 2, take 230 MB
_MAX_TOTAL = 512 << 20
_DISK_BYTES = 4096  # that a PNG of 32 x 32 takes in a folder: one block
_MIRRORS = ("https://dataset.bj.bcebos.com/cifar/", "https://www.cs.toronto.edu/~kriz/")
_PICKLED_MODULES = ("numpy", "_codecs", "builtins", "__builtin__", "collections", "copyreg", "copy_reg")
_CONTENT = "a file of CIFAR"


@dataclass(frozen=True)
class Labels:
    """One kind of labels: where they are in a batch, in a record of the binary version, and their names."""

    key: str
    column: int
    names_key: str
    names_file: str
    names: Sequence[str]


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets, as published."""

    name: str
    archives: dict[str, str]  # of the pickled and of the binary version, with their MD5
    archive_size: str
    batches: dict[str, tuple[str, ...]]
    meta: str
    columns: int  # labels in a record of the binary version
    labels: dict[str, Labels]

    @property
    def archive(self) -> str:
        """The name of the archive that is downloaded."""
        return next(iter(self.archives))

    @property
    def addresses(self) -> list[str]:
        """Where the archive is: the server that `paddle.vision.datasets` uses, and the authors'."""
        return [f"{mirror}{self.archive}" for mirror in _MIRRORS]

    def files(self) -> set[str]:
        """The names of all files that are read, of both versions."""
        batches = {name for names in self.batches.values() for name in names}
        names = {labels.names_file for labels in self.labels.values()}
        return {self.meta, *batches, *(f"{name}.bin" for name in batches), *names}


IMAGES = {"train": 50_000, "test": 10_000}
CIFAR10 = Cifar(
    name="cifar10",
    archives={
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    },
    archive_size="171 MB",
    batches={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    meta="batches.meta",
    columns=1,
    labels={"classes": Labels("labels", 0, "label_names", "batches.meta.txt", CIFAR10_NAMES)},
)
CIFAR100 = Cifar(
    name="cifar100",
    archives={
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    },
    archive_size="169 MB",
    batches={"train": ("train",), "test": ("test",)},
    meta="meta",
    columns=2,
    labels={
        "fine": Labels("fine_labels", 1, "fine_label_names", "fine_label_names.txt", CIFAR100_NAMES),
        "coarse": Labels("coarse_labels", 0, "coarse_label_names", "coarse_label_names.txt", CIFAR100_COARSE_NAMES),
    },
)


class _Files:
    """The files of an archive or a folder; `where` names one in messages."""

    def __init__(self, path: Path, cifar: Cifar) -> None:
        self._path = path
        wanted = cifar.files()
        self._contents: dict[str, bytes] = {}
        if path.is_file():
            self._contents = read_small_members(path, wanted, _MAX_FILE, _MAX_TOTAL)
            self.names = set(self._contents)
        else:
            self.names = {name for name in wanted if (path / name).is_file()}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> bytes:
        return self._contents[name] if name in self._contents else (self._path / name).read_bytes()

    def size(self, name: str) -> int:
        return len(self._contents[name]) if name in self._contents else (self._path / name).stat().st_size

    def where(self, name: str) -> str:
        return f"{self._path}: {name}" if self._contents else str(self._path / name)


def cifar_splits(path: Path, cifar: Cifar, kind: str) -> dict[str, SplitSource]:
    """Where the splits are in `path`: an archive, or a folder with it, with what is in it, or with class folders.

    Args:
        kind: of labels, a key of `cifar.labels`.

    Raises:
        FileNotFoundError: nothing of the data set is there.
        ValueError: it is damaged, hostile, incomplete or another data set.
    """
    found = _inside(path, cifar)
    if found.is_dir() and all((found / split).is_dir() for split in cifar.batches):
        return class_folder_units(found, tuple(cifar.batches))
    files = _Files(found, cifar)
    found_files = {split: [_version(name, files) for name in names] for split, names in cifar.batches.items()}
    missing = [
        name for split, names in cifar.batches.items() for name, file in zip(names, found_files[split]) if file is None
    ]
    if len(missing) == sum(map(len, cifar.batches.values())):
        raise FileNotFoundError(f"{path}: nothing of {cifar.name} is there: {_wanted(cifar)}")
    if missing:
        raise ValueError(f"{found} is incomplete: {', '.join(missing)} missing")
    labels = cifar.labels[kind]
    names = _class_names(files, cifar, labels)
    origin = f"{found.name}, {found.stat().st_size if found.is_file() else 'folder'}"
    return {
        split: SplitSource(
            origin=f"{origin} ({', '.join(batches)})",
            units=[Unit(batch, _reader(files, batch, cifar, labels, names)) for batch in batches],
            needed=sum(files.size(batch) for batch in batches) // _PIXELS * _DISK_BYTES,
        )
        for split, batches in found_files.items()
    }


def _wanted(cifar: Cifar) -> str:
    folder = cifar.archive.replace("-python.tar.gz", "-batches-py" if cifar is CIFAR10 else "-python")
    return (
        f"give {', '.join(cifar.archives)}, the folder that one of them holds (such as {folder}), or a "
        "folder with class folders in train and test"
    )


def _inside(path: Path, cifar: Cifar) -> Path:
    """What to read of a folder: itself, what an archive was unpacked to in it, or an archive in it."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_file():
        return path
    batches = [name for names in cifar.batches.values() for name in names]
    folders = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]
    for folder in folders:
        if any((folder / name).is_file() or (folder / f"{name}.bin").is_file() for name in batches):
            return folder
    archives = [path / name for name in cifar.archives if (path / name).is_file()]
    return archives[0] if archives else path


def _version(batch: str, files: _Files) -> Optional[str]:
    """The file that holds a batch: the pickle, or the binary version."""
    return next((name for name in (batch, f"{batch}.bin") if name in files), None)


def _class_names(files: _Files, cifar: Cifar, labels: Labels) -> list[str]:
    """Those in the source; the published ones where it has none."""
    names: Any = labels.names
    where = cifar.meta
    if cifar.meta in files:
        where = files.where(cifar.meta)
        names = _unpickled(files.read(cifar.meta), where).get(labels.names_key)
    elif labels.names_file in files:
        where = files.where(labels.names_file)
        names = files.read(labels.names_file).decode("utf-8", "replace").split()
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"{where}: it has no {labels.names_key}")
    names = [checked_name(_text(name, where), where) for name in names]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: a class is named twice")
    return names


def _text(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        value = value.decode("latin1")
    if not isinstance(value, str):
        raise ValueError(f"{where}: a name of a class is a {type(value).__name__}")
    return value


def _reader(
    files: _Files, batch: str, cifar: Cifar, labels: Labels, names: Sequence[str]
) -> Callable[[int], Iterator[PublicImage]]:
    def images(before: int) -> Iterator[PublicImage]:
        where = files.where(batch)
        raw = files.read(batch)
        if batch.endswith(".bin"):
            pixels, numbers = _records(raw, where, cifar.columns, labels.column)
        else:
            pixels, numbers = _pickled_batch(raw, where, labels.key)
        for offset, (row, number) in enumerate(zip(pixels, numbers)):
            if not 0 <= number < len(names):
                raise ValueError(f"{where}: image {offset} has label {number}, and there are {len(names)} classes")
            yield PublicImage(names[number], f"{before + offset:05d}.png", _png(row))

    return images


def _png(row: np.ndarray) -> bytes:
    """row: [3072] uint8, all red values first, rows from the top."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _records(raw: bytes, where: str, columns: int, column: int) -> tuple[np.ndarray, Sequence[int]]:
    """Pixels [N, 3072] and labels [N] of a file of the binary version."""
    size = columns + _PIXELS
    if not raw or len(raw) % size:
        raise ValueError(f"{where}: truncated, or not of this data set: {len(raw)} bytes are no records of {size}")
    table = np.frombuffer(raw, np.uint8).reshape(-1, size)
    return table[:, columns:], table[:, column].tolist()


def _pickled_batch(raw: bytes, where: str, key: str) -> tuple[np.ndarray, Sequence[int]]:
    """Pixels [N, 3072] and labels [N] of a pickled batch."""
    batch = _unpickled(raw, where)
    pixels, numbers = batch.get("data"), batch.get(key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise ValueError(f"{where}: its data must be numbers [N, {_PIXELS}] of one byte: {_kind(pixels)}")
    if isinstance(numbers, np.ndarray) and numbers.ndim == 1:
        numbers = list(numbers)
    if not isinstance(numbers, list) or not all(isinstance(number, (int, np.integer)) for number in numbers):
        raise ValueError(f"{where}: it has no list of {key}: it has {', '.join(sorted(map(str, batch)))}")
    if len(numbers) != len(pixels):
        raise ValueError(f"{where}: {len(pixels)} images have {len(numbers)} labels")
    return pixels, [int(number) for number in numbers]


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"they are {value.dtype} {list(value.shape)}"
    return "there are none" if value is None else f"they are a {type(value).__name__}"


def _unpickled(raw: bytes, where: str) -> dict[str, Any]:
    """The dict in a pickle, whose keys Python 2 wrote as bytes; nothing in it is executed.

    Raises:
        ValueError: it is damaged, asks for anything but data, or is no dict.
    """
    with blaming(Path(where), _CONTENT):
        globals_ = Globals(Budget(len(raw)))
        table = {name: value for name, value in globals_.table.items() if name[0].split(".")[0] in _PICKLED_MODULES}
        machine = PickleMachine(raw, table, globals_.build)
        machine.content = _CONTENT
        value = machine.run()
        globals_.finish()
    if not isinstance(value, dict):
        raise ValueError(f"{where}: it holds a {type(value).__name__}, not the dict of {_CONTENT}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): entry for key, entry in value.items()}
