"""The lists that go with a tarball: which of its files to take, and their labels."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Optional, Protocol, Union

import numpy as np

from passl.data.tar_members import TarError, printable

PathLike = Union[str, os.PathLike]
_MAX_SHOWN = 10
_MAX_LABEL = 2**63 - 1


def base_name(path: str) -> str:
    """The last part of a member's path."""
    return path.rstrip("/").rpartition("/")[2]


def shortened(items: Sequence[object]) -> str:
    """The first ten, and how many more."""
    more = len(items) - _MAX_SHOWN
    return ", ".join(map(str, items[:_MAX_SHOWN])) + (f" and {more} more" if more > 0 else "")


class NameList:
    """Files by name: each line of the list is a base name (`a.jpg`) or a whole path in the tarball (`x/a.jpg`).

    A base name stands for all files of that name; `./a.jpg` is only the one outside all folders. `.csv`: the column
    `filename` (or `column`); a list of one column needs no header. Others: one name a line.

    Raises:
        FileNotFoundError: there is no list.
        TarError: it is empty, or a csv without the column.
    """

    def __init__(self, path: PathLike, column: str = "filename") -> None:
        self.path = os.fspath(path)
        text = _read_text(self.path)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if self.path.lower().endswith(".csv"):
            rows = list(_rows(self.path, csv.reader(io.StringIO(text, newline=""), strict=True)))
            lines = _column(self.path, [row for row in rows if any(map(str.strip, row))], column)
        if not lines:
            raise TarError(f"{self.path} lists no files")
        self._met = dict.fromkeys(lines, False)

    def __contains__(self, path: str) -> bool:
        """Whether the list names the member `path`; notes that it was asked."""
        plain = _plain(path)
        found = False
        for name in (base_name(path), plain, f"./{plain}"):
            if name in self._met:
                found = self._met[name] = True
        return found

    def __len__(self) -> int:
        return len(self._met)

    def unmet(self) -> list[str]:
        """The names of the list that no member had so far."""
        return [name for name, met in self._met.items() if not met]


class Labels(Protocol):
    """Where the class indices in an index come from."""

    def number(self, path: str) -> int:
        """Of the class of the member `path`. Raises TarError: it has none."""

    def finish(self, numbers: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """The labels [N] for the numbers that `number` gave, and (label, class name) of all classes.

        Raises TarError: something about them is wrong.
        """


class FolderLabels:
    """The class of a file is the folder that it lies in; classes are numbered in sorted order of their names.

    Args:
        class_names: in the order of their labels, to have others than those in the tarball.
    """

    def __init__(self, class_names: Optional[Sequence[str]] = None) -> None:
        self._class_names = class_names
        self._number_of: dict[str, int] = {}

    def number(self, path: str) -> int:
        folder = base_name(path.rstrip("/").rpartition("/")[0])
        if folder in ("", "."):
            raise TarError(f"{printable(path)!r} lies in no folder that could be its class")
        return self._number_of.setdefault(folder, len(self._number_of))

    def finish(self, numbers: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
        names = sorted(self._number_of) if self._class_names is None else list(self._class_names)
        label_of = {name: label for label, name in enumerate(names)}
        unknown = sorted(set(self._number_of) - set(label_of))
        if unknown:
            raise TarError(f"folders that are not among the class names: {shortened(unknown)}")
        labels = np.array([label_of[folder] for folder in self._number_of], np.uint64)
        return labels[numbers] if len(labels) else labels, list(enumerate(names))


class CsvLabels:
    """Labels of a csv with the columns `filename`, `label` and, optionally, `class`.

    `filename` is a base name, or a path in the tarball where several files have that name. `label` is a whole number
    from 0. Without `class`, class 3 is called `class_3`. Labels that are words, or `class` alone, are numbered in
    sorted order. Further columns are ignored.

    Raises:
        FileNotFoundError: there is no csv.
        TarError: what is wrong with it, by line.
    """

    def __init__(
        self,
        path: PathLike,
        file_name: str = "filename",
        label_name: str = "label",
        class_name: str = "class",
    ) -> None:
        self.path = os.fspath(path)
        text = _read_text(self.path)
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = reader.fieldnames = [name.strip() for name in next(_rows(self.path, reader.reader), ())]
        if file_name not in columns or not {label_name, class_name} & set(columns):
            raise TarError(
                f"{self.path}: line 1: the header must name the columns {file_name!r} and {label_name!r} (and, "
                f"optionally, {class_name!r}); it is {','.join(columns)!r}"
            )
        rows = []
        for row in _rows(self.path, reader):
            values = [(row.get(name) or "").strip() for name in (file_name, label_name, class_name)]
            if not values[0] or not (values[1] or values[2]):
                raise TarError(f"{self.path}: line {reader.line_num}: no {file_name} or no {label_name}")
            rows.append((reader.line_num, *values))
        if not rows:
            raise TarError(f"{self.path} has no rows")
        self._label_of: dict[str, int] = {}
        self._class_of: dict[int, str] = {}
        self._take(rows)
        self._asked: dict[str, str] = {}

    def _take(self, rows: list[tuple[int, str, str, str]]) -> None:
        numbered = all(
            label.isdecimal() or (label.endswith(".0") and label[:-2].isdecimal()) for _, _, label, _ in rows
        )
        names = sorted({label or name for _, _, label, name in rows})
        number_of = {name: number for number, name in enumerate(names)}
        for line, file, label, name in rows:
            number = int(label.partition(".")[0]) if numbered else number_of[label or name]
            if re.fullmatch(r"-\d+(\.\d*)?", label):
                raise TarError(f"{self.path}: line {line}: labels are whole numbers from 0, or words, not {label}")
            class_name = name or (f"class_{number}" if numbered else label)
            if number > _MAX_LABEL:
                raise TarError(f"{self.path}: line {line}: label {label} is above {_MAX_LABEL}")
            if self._class_of.setdefault(number, class_name) != class_name:
                raise TarError(
                    f"{self.path}: line {line}: label {number} is called {class_name!r} here and "
                    f"{self._class_of[number]!r} above"
                )
            if self._label_of.setdefault(_plain(file), number) != number:
                raise TarError(
                    f"{self.path}: line {line}: {file!r} has label {number} here and {self._label_of[_plain(file)]} "
                    "above: where files of several folders have one name, write their paths"
                )

    def number(self, path: str) -> int:
        name = base_name(path)
        if _plain(path) in self._label_of:
            return self._label_of[_plain(path)]
        if name not in self._label_of:
            raise TarError(
                f"{self.path} has no label for {printable(path)!r}: add it, or leave the file out with "
                "--restrict or --remove"
            )
        if self._asked.setdefault(name, path) != path:
            raise TarError(
                f"{self.path}: which label has {name!r}: {printable(self._asked[name])!r} or {printable(path)!r}? "
                "Write their paths"
            )
        return self._label_of[name]

    def finish(self, numbers: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
        return numbers.astype(np.uint64), list(self._class_of.items())


def _plain(path: str) -> str:
    """`path` as it is compared: tar of `.` writes "./a.jpg"."""
    return path[2:] if path.startswith("./") else path


def _read_text(path: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        # utf-8-sig: spreadsheets begin their files with a byte order mark. Names in a tarball are any bytes.
        return file.read().decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n")


def _rows(path: str, reader: Any) -> Iterator[Any]:
    """What a reader of csv gives. Raises TarError: a quote is not closed, or the like."""
    try:
        yield from reader
    except csv.Error as error:
        line = reader.line_num
        raise TarError(f"{path}: line {line}: {error}; is a quotation mark missing, or is it no csv?") from error


def _column(path: str, rows: list[list[str]], column: str) -> list[str]:
    header = [name.strip() for name in rows[0]] if rows else []
    if column in header:
        index = header.index(column)
        return [row[index].strip() for row in rows[1:] if len(row) > index and row[index].strip()]
    if any(len(row) > 1 for row in rows):
        raise TarError(f"{path}: line 1: the header must name the column {column!r}; it is {','.join(header)!r}")
    return [row[0].strip() for row in rows]
