"""Revisited Oxford and Paris (Radenovic et al. 2018): the ground truth of its file, and its images.

The layout is the public one: `{root}/{benchmark}/gnd_{benchmark}.pkl`, and the images in `{root}/{benchmark}/jpg`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image, ImageFile

from passl.data.datasets import ImageFiles
from passl.data.errors import UnreadableImageError
from passl.formats.plain_pickle import load_pickle

logger = logging.getLogger("passl")

_MAX_SHOWN = 5


@dataclass(frozen=True)
class Query:
    """One query. easy, hard, junk: numbers of database images [n] int64; box: left, upper, right, lower in pixels, if
    the file has one.
    """

    box: Optional[tuple[float, float, float, float]]
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


@dataclass(frozen=True)
class GroundTruth:
    """Files of the database and of the queries, and what is right for each query, in the same order."""

    images: list[str]
    query_images: list[str]
    queries: list[Query]


def read_ground_truth(root: str, benchmark: str) -> GroundTruth:
    """The ground truth of `benchmark`; its pickle is read without executing it.

    Raises:
        FileNotFoundError: the file or images that it names are missing.
        ValueError: it does not have the public form; the text says where.
    """
    if not benchmark or Path(benchmark).name != benchmark:
        raise ValueError(f"benchmark ({benchmark!r}) must be the name of a folder in root, such as roxford5k")
    folder = Path(root).expanduser() / benchmark
    path = folder / f"gnd_{benchmark}.pkl"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: root must hold {benchmark}/gnd_{benchmark}.pkl and the folder {benchmark}/jpg"
        )
    content = load_pickle(path)
    parts = {key: _entry(content, key, str(path)) for key in ("imlist", "qimlist", "gnd")}
    parts = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in parts.items()}
    for key, value in parts.items():
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{path}: {key} must be a list that is not empty")
    if len(parts["gnd"]) != len(parts["qimlist"]):
        raise ValueError(f"{path}: gnd has {len(parts['gnd'])} entries for {len(parts['qimlist'])} queries (qimlist)")
    queries = [_query(entry, len(parts["imlist"]), f"{path}: gnd[{i}]") for i, entry in enumerate(parts["gnd"])]
    images, query_images = (
        [_image_path(folder, name, f"{path}: {key}") for name in parts[key]] for key in ("imlist", "qimlist")
    )
    missing = [image for image in dict.fromkeys(query_images + images) if not os.path.isfile(image)]
    if missing:
        more = f" and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
        raise FileNotFoundError(f"{path} names images that are missing: {', '.join(missing[:_MAX_SHOWN])}{more}")
    return GroundTruth(images, query_images, queries)


def _entry(content: Any, key: str, where: str) -> Any:
    if isinstance(content, dict):
        for name in (key, key.encode()):  # bytes: a pickle of Python 2 that was read and written again
            if name in content:
                return content[name]
        raise ValueError(f"{where} has no {key!r}, but only {', '.join(sorted(map(str, content))) or 'nothing'}")
    raise ValueError(f"{where} must be a dict with {key!r}, not a {type(content).__name__}")


def _query(entry: Any, count: int, where: str) -> Query:
    numbers = {key: _numbers(_entry(entry, key, where), count, f"{where}[{key!r}]") for key in ("easy", "hard", "junk")}
    if not {"bbx", b"bbx"} & set(entry):
        return Query(None, **numbers)
    box = _row(_entry(entry, "bbx", where))
    if box.shape != (4,) or box.dtype.kind not in "iuf" or not np.isfinite(box).all():
        raise ValueError(f"{where}['bbx'] must be four numbers: left, upper, right and lower")
    return Query(tuple(float(value) for value in box), **numbers)


def _row(value: Any) -> np.ndarray:
    """[n]; of objects if `value` is no array."""
    try:
        return np.asarray(value).reshape(-1)
    except ValueError:  # lists of several lengths
        return np.array([None])


def _numbers(value: Any, count: int, where: str) -> np.ndarray:
    numbers = _row(value)
    if not numbers.size:
        return np.empty(0, np.int64)
    if numbers.dtype.kind not in "iuf" or not np.array_equal(numbers, np.floor(numbers)):
        raise ValueError(f"{where} must be a list of whole numbers")
    if numbers.min() < 0 or numbers.max() >= count:
        raise ValueError(f"{where} must be numbers from 0 to {count - 1} (imlist has {count}), not {numbers.tolist()}")
    return numbers.astype(np.int64)


def _image_path(folder: Path, name: Any, where: str) -> str:
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    if not isinstance(name, str) or os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{where} holds {name!r}, which is no name inside a folder")
    return os.fspath(folder / "jpg" / f"{name}.jpg")


class RetrievalImages(ImageFiles):
    """Images that are made no larger than a square; every one must be readable.

    A file that ends too early counts as readable, as in the official code: the rest is grey, and it is logged.

    Args:
        image_size: of the square, in pixels; smaller images stay as they are. None: all do.
        boxes: what to cut out of each image before; None: nothing.
        transform: from the image to an array.

    Attributes:
        least_side: of the image that comes of it, in pixels.
    """

    least_side = 1

    def __init__(
        self,
        paths: Sequence[str],
        transform: Callable[..., Any],
        image_size: Optional[int] = None,
        boxes: Optional[Sequence[tuple[float, float, float, float]]] = None,
    ) -> None:
        super().__init__(paths, None, (), transform, max_bad_samples=0)
        self.image_size = image_size
        self.boxes = boxes

    def content(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        image = self._image(index)
        if self.boxes is not None:
            image = image.crop(_inside(self.boxes[index], image.size, self.describe(index)))
        if self.image_size is not None:
            image.thumbnail((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        if min(image.size) < self.least_side:
            width, height = image.size
            raise UnreadableImageError(
                self.describe(index),
                f"{width} x {height} pixels, with image_size {self.image_size}, are too few for this network: both "
                f"sides must be at least {self.least_side}",
            )
        return {"image": self.transform(image, rng)}

    def _image(self, index: int) -> Image.Image:
        source = self.source(index)
        try:
            return source.image()
        except UnreadableImageError as error:
            strict, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
            try:
                image = source.image()
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = strict
            logger.warning("%s is used as far as it goes", error)
            return image


def _inside(box: tuple[float, ...], size: tuple[int, int], where: str) -> tuple[int, int, int, int]:
    """`box` in whole pixels, cut to an image of `size` (width, height)."""
    left, upper, right, lower = (round(value) for value in box)
    inside = max(left, 0), max(upper, 0), min(right, size[0]), min(lower, size[1])
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UnreadableImageError(
            where, f"its box (bbx) {box} is empty or outside of the {size[0]} x {size[1]} pixels"
        )
    return inside
