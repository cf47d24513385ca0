"""The classes of ImageNet's validation images, whose names do not tell them.

Three sources have them: the development kit of the official archives, `LOC_val_solution.csv` of the Kaggle edition, and
lists that people made of these (a WordNet id on each line, with or without the image's name).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

from passl.data.public.archives import read_small_members
from passl.data.public.matlab import read_variables

KAGGLE_SOLUTION = "LOC_val_solution.csv"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
_MAX_BYTES = 64 << 20
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"_(\d{8})(?:\D|$)")  # ILSVRC2012_val_00000001.JPEG


class ValLabels:
    """The class of each validation image, by its name or by its number.

    Args:
        where: the file they are from, for messages.
    """

    def __init__(self, where: Path, by_name: dict[str, str], by_number: dict[int, str]) -> None:
        self.where, self._by_name, self._by_number = where, by_name, by_number

    def of(self, name: str) -> str:
        """The WordNet id of the image in the file `name`.

        Raises:
            ValueError: there is none for it.
        """
        stem = name.rpartition(".")[0] or name
        found = self._by_name.get(stem)
        number = _NUMBER.search(name)
        if found is None and number:
            found = self._by_number.get(int(number[1]))
        if found is None:
            raise ValueError(f"{self.where} has no class for {name}")
        return found


def read_val_labels(path: Path) -> ValLabels:
    """Of a development kit (its archive or its folder), of a Kaggle solution, or of a list.

    Raises:
        ValueError: it is none of them, or damaged; the text says where.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        files = {name: next(iter(sorted(path.rglob(name))), None) for name in (TRUTH, META)}
        return _of_kit(path, {name: file.read_bytes() for name, file in files.items() if file})
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return _of_kit(path, read_small_members(path, {TRUTH, META}, _MAX_BYTES, _MAX_BYTES))
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if path.name == TRUTH:
        return _of_kit(path, {TRUTH: text.encode(), META: _beside(path)})
    return _of_solution(path, text) if path.suffix.lower() == ".csv" else _of_list(path, text)


def _beside(truth: Path) -> bytes:
    meta = truth.with_name(META)
    if not meta.is_file():
        raise ValueError(f"{truth} numbers the classes, and {meta}, which says what the numbers mean, is missing")
    return meta.read_bytes()


def _of_kit(path: Path, files: dict[str, bytes]) -> ValLabels:
    missing = [name for name in (TRUTH, META) if name not in files]
    if missing:
        raise ValueError(f"{path}: {' and '.join(missing)} missing: not ImageNet's development kit")
    wnids = _wnids(path, files[META])
    by_number = {}
    for line, text in enumerate(files[TRUTH].decode("latin1").split(), start=1):
        if not text.isdecimal() or int(text) not in wnids:
            raise ValueError(f"{path}: {TRUTH}, line {line}: {text[:20]!r} is not the number of a class in {META}")
        by_number[line] = wnids[int(text)]
    return ValLabels(path, {}, by_number)


def _wnids(path: Path, meta: bytes) -> dict[int, str]:
    """WordNet ids by ILSVRC2012_ID."""
    try:
        synsets = read_variables(meta).get("synsets")
    except ValueError as error:
        raise ValueError(f"{path}: {META}: {error}") from None
    found = {}
    for synset in _flat(synsets):
        number, wnid = synset.get("ILSVRC2012_ID"), synset.get("WNID")
        if not isinstance(number, list) or len(number) != 1 or not isinstance(wnid, str) or not _WNID.fullmatch(wnid):
            raise ValueError(f"{path}: {META}: a class without ILSVRC2012_ID and WNID")
        found[int(number[0])] = wnid
    if not found:
        raise ValueError(f"{path}: {META}: no synsets")
    return found


def _flat(value: Any) -> Iterable[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item)


def _of_solution(path: Path, text: str) -> ValLabels:
    """Lines `ILSVRC2012_val_00048981,n03995372 85 1 499 272`: the first word of the second column is the class."""
    by_name = {}
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{path}: line 1: it must name the columns ImageId and PredictionString, as {KAGGLE_SOLUTION}")
    for row in rows:
        wnid = _first_wnid(row["PredictionString"] or "")
        if wnid is None or not row["ImageId"]:
            raise ValueError(f"{path}: line {rows.line_num}: no image, or no class such as n01440764")
        by_name[row["ImageId"].strip()] = wnid
    return ValLabels(path, by_name, {})


def _of_list(path: Path, text: str) -> ValLabels:
    """Lines `n01751748`, of which the first is that of image 1, or `ILSVRC2012_val_00000001.JPEG n01751748`."""
    by_name, by_number = {}, {}
    for line, content in enumerate(text.splitlines(), start=1):
        words = content.replace(",", " ").split()
        wnids = [word for word in words if _WNID.fullmatch(word)]
        names = [word for word in words if _NUMBER.search(word)]
        if len(wnids) != 1 or len(words) > 2 or len(words) != len(wnids) + len(names):
            raise ValueError(
                f"{path}: line {line}: {content[:60]!r} must be a class such as n01440764, or an image and one"
            )
        if names:
            by_name[Path(names[0]).name.partition(".")[0]] = wnids[0]
        else:
            by_number[line] = wnids[0]
    if by_name and by_number:
        raise ValueError(f"{path}: some lines name an image, and some do not")
    return ValLabels(path, by_name, by_number)


def _first_wnid(text: str) -> Optional[str]:
    words = text.split()
    return words[0] if words and _WNID.fullmatch(words[0]) else None
