"""Data sets of image files: class folders, plain folders, and lists."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from passl.data.file_index import FileIndex, Paths, find_images
from passl.data.image_io import ImageSource, read_source
from passl.data.samples import ImageSamples
from passl.registry import DATASETS, did_you_mean

PathLike = Union[str, os.PathLike]
_MAX_PROBLEMS_SHOWN = 10
_MAX_LABEL = 2**63 - 1  # labels are int64


class ImageFiles(ImageSamples):
    """Image files on disk; what the data sets of this module have in common.

    Attributes:
        paths: of the files, in the data set's order; a sequence of strings.
    """

    def __init__(
        self,
        paths: Paths,
        labels: Optional[Sequence[int]],
        class_names: Sequence[str],
        transform: Optional[Callable[..., Any]],
        max_bad_samples: int,
    ) -> None:
        super().__init__(labels, class_names, transform, max_bad_samples)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> ImageSource:
        return read_source(self.paths[index])


@DATASETS.register()
class ImageFolder(ImageFiles):
    """`root/<class>/.../<image>`: each folder in `root` is a class; classes and files are in sorted order.

    `root` takes `~`. Files and folders whose names begin with a dot, and files without an image's extension,
    are ignored.

    Raises:
        FileNotFoundError: `root` is missing, or has no class folders, or a class has no images.
        ValueError: images lie in `root` itself.
    """

    def __init__(
        self,
        root: PathLike,
        transform: Optional[Callable[..., Any]] = None,
        max_bad_samples: int = 10,
    ) -> None:
        root = _existing_folder(root)
        index = find_images(root, by_class=True)
        stray = [name for name in index.names_in(0) if os.path.isfile(os.path.join(root, name))]
        if stray:
            raise ValueError(
                f"{root} contains images directly (such as {stray[0]!r}), but ImageFolder needs a folder per "
                "class. For images without class folders use 'name: ImageList' with the same root."
            )
        counts = _images_of_classes(index)
        if not counts:
            raise FileNotFoundError(f"{root} contains no class folders")
        empty = [name for name, count in counts.items() if not count]
        if empty:
            raise FileNotFoundError(f"{root}: no images in the class folder(s) {_shortened(empty)}")
        # A name in the root that is no stray file, such as a link to nowhere, belongs to no class.
        first = len(index.names_in(0))
        paths = index.paths()
        super().__init__(
            paths=Paths.of(paths[first:]) if first else paths,
            labels=np.repeat(np.arange(len(counts)), list(counts.values())),
            class_names=list(counts),
            transform=transform,
            max_bad_samples=max_bad_samples,
        )


@DATASETS.register()
class ImageList(ImageFiles):
    """Images of any folder, or those that a file lists. Give `root`, `list_file` or both.

    - `root` alone: every image in the folder and its sub-folders, sorted, without labels.
    - `list_file` ending in `.csv`: columns `path` and, optionally, `label`; further columns are ignored.
      Labels are whole numbers from 0, which need no names, or class names.
    - any other `list_file`: one path per line, without labels.

    Both kinds are UTF-8. Relative paths start from `root` or, without it, from the list's own folder. Class
    names are numbered in sorted order, or in the order of `class_names`: give it when a list may lack some of
    the classes.

    Raises:
        FileNotFoundError: the folder or the list is missing, or holds no images.
        ValueError: lines of the list are malformed; names them by number.
    """

    def __init__(
        self,
        root: Optional[PathLike] = None,
        list_file: Optional[PathLike] = None,
        class_names: Optional[Sequence[str]] = None,
        transform: Optional[Callable[..., Any]] = None,
        max_bad_samples: int = 10,
    ) -> None:
        if root is None and list_file is None:
            raise ValueError("ImageList needs a root (a folder of images), a list_file, or both")
        if root is not None:
            root = _existing_folder(root)
        if list_file is None:
            paths, names = find_images(root).paths(), None
            if not paths:
                raise FileNotFoundError(f"{root} contains no images, nor do its sub-folders")
        else:
            paths, names = _read_list(Path(list_file).expanduser(), root)
        if names is None and class_names is not None:
            raise ValueError("class_names is given, but there are no labels")
        labels, class_names = (None, ()) if names is None else _number_labels(names, class_names, list_file)
        super().__init__(paths, labels, class_names, transform, max_bad_samples)


# --- folders ---


def _existing_folder(root: PathLike) -> str:
    root = os.path.expanduser(os.fspath(root))
    if not os.path.isdir(root):
        raise FileNotFoundError(f"there is no folder {root}")
    return root


def _images_of_classes(index: FileIndex) -> dict[str, int]:
    """How many images each folder directly below the root holds, in the order of the index."""
    counts: dict[str, int] = {}
    for folder, count in zip(index.folders, np.diff(index.ends, prepend=0).tolist()):
        name = folder.partition("/")[0]
        if name:
            counts[name] = counts.get(name, 0) + count
    return counts


def _shortened(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_MAX_PROBLEMS_SHOWN])
    more = len(items) - _MAX_PROBLEMS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


# --- lists ---


def _read_list(list_file: Path, root: Optional[str]) -> tuple[Paths, Optional[list[str]]]:
    """Paths, and labels as text if the list has them."""
    if not list_file.is_file():
        raise FileNotFoundError(f"there is no file {list_file}")
    try:
        # utf-8-sig: spreadsheets begin their files with a byte order mark.
        text = list_file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{list_file} is not UTF-8 text: {error}") from error
    if list_file.suffix.lower() == ".csv":
        paths, names = _parse_csv(text, list_file)
    else:
        paths, names = [line.strip() for line in text.split("\n") if line.strip()], None
    if not paths:
        raise FileNotFoundError(f"{list_file} lists no images")
    folder = os.fspath(list_file.parent) if root is None else root
    return Paths.of([os.path.join(folder, path) for path in paths]), names


def _parse_csv(text: str, list_file: Path) -> tuple[list[str], Optional[list[str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="surplus", strict=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    if "path" not in columns:
        raise ValueError(
            f"{list_file}: line 1: the header must name the columns 'path' and, optionally, 'label'; it is "
            f"{','.join(columns)!r}"
        )
    reader.fieldnames = columns
    wanted = [name for name in ("path", "label") if name in columns]
    rows: list[dict[str, str]] = []
    problems: list[str] = []
    try:
        for row in reader:
            missing = [name for name in wanted if not (row[name] or "").strip()]
            if missing:
                problems.append(f"line {reader.line_num}: no {' and no '.join(missing)}")
            elif "surplus" in row:
                problems.append(f"line {reader.line_num}: more fields than the {len(columns)} columns of the header")
            rows.append(row)
    except csv.Error as error:
        problems.append(f"line {reader.reader.line_num}: {error}")
    if problems:
        raise ValueError(_listed(list_file, problems))
    paths = [row["path"].strip() for row in rows]
    return paths, [row["label"].strip() for row in rows] if "label" in wanted else None


def _number_labels(
    names: list[str], class_names: Optional[Sequence[str]], list_file: PathLike
) -> tuple[list[int], list[str]]:
    """Labels and class names for the texts in a list's label column; labels that are numbers have no names."""
    if class_names is None and all(re.fullmatch(r"[+-]?\d+", name) for name in names):
        labels = [int(name) for name in names]
        for label in (min(labels), max(labels)):
            if not 0 <= label <= _MAX_LABEL:
                raise ValueError(
                    f"{os.fspath(list_file)}: labels must be whole numbers from 0 to {_MAX_LABEL} or names, not {label}"
                )
        return labels, []
    class_names = sorted(set(names)) if class_names is None else [str(name) for name in class_names]
    label_of = {name: label for label, name in enumerate(class_names)}
    if len(label_of) != len(class_names):
        raise ValueError(f"class_names contains a name twice: {_shortened(class_names)}")
    unknown = sorted(set(names) - set(label_of))
    if unknown:
        problems = [f"label {name!r} is not in class_names. {did_you_mean(name, class_names)}" for name in unknown]
        raise ValueError(_listed(list_file, problems))
    return [label_of[name] for name in names], class_names


def _listed(list_file: PathLike, problems: Sequence[str]) -> str:
    lines = [f"{os.fspath(list_file)}: {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN]]
    if len(problems) > _MAX_PROBLEMS_SHOWN:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS_SHOWN} more")
    return "\n".join(lines)
