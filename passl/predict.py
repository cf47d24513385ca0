"""Classes and features of images and videos, by a file that ``passl-export`` wrote. Memory does not grow with them."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Callable, Optional, Union

import numpy as np

from passl.data.datasets import ImageList
from passl.data.image_io import AnyImage, UnreadableImageError, read_source
from passl.exported import ExportedNetwork, replacing, require

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"})

Transform = Callable[[AnyImage], np.ndarray]


class SourceError(ValueError):
    """A source that is not there, or a name under which nothing is found."""


@dataclass
class Picture:
    """An image yet to be read: its name, and a function that returns it or raises UnreadableImageError."""

    name: str
    read: Callable[[], AnyImage]


@dataclass
class Prediction:
    """What became of a picture: features [D] and probabilities [C] (None without a classifier), or what is wrong."""

    name: str
    features: Optional[np.ndarray] = None
    probabilities: Optional[np.ndarray] = None
    error: Optional[str] = None


# --- sources ---------------------------------------------------------------------------------------------------------


def find_files(sources: Sequence[str], channels: Optional[int] = None) -> list[str]:
    """The images and videos that ``sources`` name: files, folders (with all below them), patterns such as ``a/*.jpg``.

    channels: as in ``pictures``; with them ``.npy`` files are images.

    Raises:
        SourceError: a source is not there, or a folder has no images.
    """
    files: list[str] = []
    for source in map(os.path.expanduser, sources):
        found = [source]
        if not os.path.exists(source):
            found = sorted(glob.glob(source, recursive=True))
            if not found:
                raise SourceError(f"{source}: no such file or folder, nor a pattern that fits any")
        paths = [path for one in found for path in (_files_in(one, channels) if os.path.isdir(one) else [one])]
        files += dict.fromkeys(paths)  # a/** finds folders, and the files in them too
    return files


def _files_in(folder: str, channels: Optional[int]) -> list[str]:
    videos = [str(path) for path in Path(folder).rglob("*") if _is_video(path) and not path.name.startswith(".")]
    try:
        images = ImageList(folder, channels=channels).paths
    except FileNotFoundError as error:
        if not videos:
            raise SourceError(f"{error} (nor videos)") from error
        images = []
    return sorted([*images, *videos])


def _is_video(path: Union[str, Path]) -> bool:
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def pictures(files: Iterable[str], frame_step: int = 1, channels: Optional[int] = None) -> Iterator[Picture]:
    """The images of ``files``, and of videos each ``frame_step``-th frame, under the name ``clip.mp4#12``.

    channels: how images are read, see ``ImageSource``. Frames have three.
    """
    for path in files:
        if not _is_video(path):
            yield Picture(_printable(path), lambda path=path: read_source(path, channels).image())
        elif channels in (None, 3):
            yield from _frames(path, frame_step)
        else:
            problem = UnreadableImageError(path, f"a video has 3 channels, and the network takes {channels}")
            yield Picture(_printable(path), lambda problem=problem: _raise(problem))


def _printable(path: str) -> str:
    """``path`` as Unicode: of a name in another encoding, which nothing here could print or write, what is readable."""
    return os.fsencode(path).decode(errors="replace")


def _frames(path: str, step: int) -> Iterator[Picture]:
    av = require("av", "video")
    number = 0
    try:
        # A relative 9:30.mp4 would be of a protocol 9. Titles may be in another encoding than UTF-8.
        with av.open(os.path.abspath(path), metadata_errors="replace") as video:
            if not video.streams.video:
                raise ValueError("it has no pictures")
            for number, frame in enumerate(video.decode(video=0)):
                if number % step == 0:
                    image = frame.to_image()
                    yield Picture(f"{_printable(path)}#{number}", lambda image=image: image)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        problem = UnreadableImageError(path, f"the video ends at frame {number}: {error}")
        yield Picture(_printable(path), lambda: _raise(problem))


def _raise(error: Exception) -> Any:
    raise error


# --- predicting ------------------------------------------------------------------------------------------------------


def predict(
    network: ExportedNetwork,
    images: Iterable[Picture],
    transform: Transform,
    batch_size: int = 32,
    num_workers: int = 4,
) -> Iterator[Prediction]:
    """A prediction for each of ``images``, in their order; one that cannot be read has an ``error`` instead of numbers.

    Args:
        transform: from an image to a float32 array [C, H, W].
        num_workers: threads that read and transform.
    """
    waiting: list[tuple[Picture, Union[np.ndarray, str]]] = []
    for picture, outcome in _loaded(images, transform, num_workers, ahead=2 * batch_size):
        # Networks of any image size: a batch has one size.
        fits = isinstance(outcome, str) or all(isinstance(o, str) or o.shape == outcome.shape for _, o in waiting)
        if not fits or len(waiting) == batch_size:
            yield from _run(network, waiting)
            waiting = []
        waiting.append((picture, outcome))
    yield from _run(network, waiting)


def _loaded(
    images: Iterable[Picture], transform: Transform, num_workers: int, ahead: int
) -> Iterator[tuple[Picture, Union[np.ndarray, str]]]:
    """Each picture with its array, or with what is wrong with it."""

    def load(picture: Picture) -> Union[np.ndarray, str]:
        try:
            return transform(picture.read())
        except UnreadableImageError as error:
            return error.reason

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        pending: deque[tuple[Picture, Future]] = deque()
        for picture in images:
            pending.append((picture, pool.submit(load, picture)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _run(network: ExportedNetwork, loaded: Sequence[tuple[Picture, Union[np.ndarray, str]]]) -> Iterator[Prediction]:
    arrays = [outcome for _, outcome in loaded if not isinstance(outcome, str)]
    results = network(np.stack(arrays)) if arrays else {}
    rows = ({name: values[row] for name, values in results.items()} for row in range(len(arrays)))
    for picture, outcome in loaded:
        if isinstance(outcome, str):
            yield Prediction(picture.name, error=outcome)
        else:
            row = next(rows)
            yield Prediction(picture.name, row["features"], row.get("probabilities"))


# --- what is shown and written ---------------------------------------------------------------------------------------


def best_classes(probabilities: np.ndarray, class_names: Sequence[str], topk: int) -> list[dict[str, Any]]:
    """The ``topk`` most probable classes, best first: ``{"class": name, "index": 3, "probability": 0.93}``."""
    order = np.argsort(-probabilities, kind="stable")[:topk]
    return [{"class": class_names[i], "index": int(i), "probability": float(probabilities[i])} for i in order]


def json_line(prediction: Prediction, class_names: Sequence[str], topk: int) -> str:
    """``{"path": ..., "classes": [...]}``, or ``{"path": ..., "error": ...}``."""
    line: dict[str, Any] = {"path": prediction.name}
    if prediction.error is not None:
        line["error"] = prediction.error
    elif prediction.probabilities is not None:
        line["classes"] = best_classes(prediction.probabilities, class_names, topk)
    return json.dumps(line, ensure_ascii=False)


def table_line(prediction: Prediction, class_names: Sequence[str], topk: int, widths: tuple[int, int]) -> str:
    """Name and best classes with their probabilities in percent; ``widths``: of the name and of a class."""
    name = prediction.name if len(prediction.name) <= widths[0] else "..." + prediction.name[3 - widths[0] :]
    if prediction.probabilities is None:
        return f"{name:<{widths[0]}}  {prediction.error or ''}"
    classes = best_classes(prediction.probabilities, class_names, topk)
    cells = (f"{one['class'][: widths[1]]:<{widths[1]}} {100 * one['probability']:5.1f} %" for one in classes)
    return "  ".join([f"{name:<{widths[0]}}", *cells]).rstrip()


class FeatureFile:
    """``features.npy`` [N, D] float32, and ``features.txt`` with the name of each row; both appear at the end.

    Used as a context manager; after an exception there are no files.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix != ".npy":
            raise SourceError(f"{self.path}: a file of features must end in .npy")
        self.names_path = self.path.with_suffix(".txt")
        self.count = 0
        self.dim = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FeatureFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a name until they are whole: nothing is left of a process that is killed.
        self._rows = self._stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
        self._names = self._stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
        return self

    def add(self, prediction: Prediction) -> None:
        if prediction.features is not None:
            row = np.ascontiguousarray(prediction.features, np.float32)
            self.count, self.dim = self.count + 1, row.size
            self._rows.write(row.tobytes())
            self._names.write(" ".join(prediction.name.splitlines()).encode() + b"\n")

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> Optional[bool]:
        if kind is None:
            # The header has the number of rows, which only the end of the last video tells.
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False}
            with replacing(self.path) as rows, rows.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (self.count, self.dim)})
                _copy(self._rows, file)
            with replacing(self.names_path) as names, names.open("wb") as file:
                _copy(self._names, file)
        return self._stack.__exit__(kind, error, trace)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    source.seek(0)
    shutil.copyfileobj(source, target, 1 << 22)
