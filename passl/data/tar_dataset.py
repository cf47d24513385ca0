"""The data set of images in tarballs, read in place through the index that `passl-data tar-index` writes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from passl.data.image_io import ImageSource, UnreadableImageError
from passl.data.samples import ImageSamples
from passl.data.tar_index import CLASS_IDS, COHORTS, entries_name, names_name
from passl.data.tar_lists import base_name, shortened
from passl.data.tar_members import BLOCK, PositionalFile, TarError, header_before, path_in, printable
from passl.data.tar_names import Names, read_names, read_rows
from passl.formats.limits import DAMAGE
from passl.registry import DATASETS

PathLike = Union[str, os.PathLike]
_CHECKED_HEADERS = 16
_MAX_CLASSES = 1 << 20


class _Tarball(NamedTuple):
    """One tarball of a folder, and the names of its files."""

    file: PositionalFile
    names: Names


class _Part(NamedTuple):
    """The index of one folder.

    entries: uint64 [N, 4], or [N, 5] with the number of the tarball; mapped, not read.
    tarballs: by number.
    """

    entries: np.ndarray
    tarballs: dict[int, _Tarball]

    def tarball_of(self, row: Sequence[int]) -> _Tarball:
        return self.tarballs[row[4] if len(row) > 4 else 0]


@DATASETS.register()
class TarDataset(ImageSamples):
    """Images in tarballs, in the order of their index; `passl-data tar-index` writes it, and so does the clemsgrs code.

    In the folder `root` (`~` works): `{prefix}_entries[_{suffix}].npy` and `{prefix}_file_indices.npy`. Files of the
    prefix "pretrain" may also be without it. An index over several tarballs has `cohort_indices.npy` beside it, and
    `{cohort}.tar` and `{cohort}_file_indices.npy` of each. Bytes are read where they are; workers share the index.

    Args:
        root: a folder, or several, whose images follow each other.
        suffix: of the entries of a part, such as "fold0".
        tarball: the tarball, or one for each root, if it is not in `root` under the name `{prefix}_dataset.tar`,
            `{prefix}.tar` or `dataset.tar` ("query" and "test": also `downstream_dataset.tar`), or the only one
            there; relative paths start from `root`.
        labels: whether the entries' class indices are labels; None: if `class-ids.npy` is in `root`, unless the
            prefix is "pretrain" and all are 0.

    Raises:
        FileNotFoundError: a tarball or its index is missing; says how to write it.
        TarError: the index is damaged or does not fit the tarball.
        CheckpointFormatError: the names are damaged, or a pickle that could execute something.
    """

    def __init__(
        self,
        root: Union[PathLike, Sequence[PathLike]],
        prefix: Optional[str] = "pretrain",
        suffix: Optional[str] = None,
        tarball: Optional[Union[PathLike, Sequence[PathLike]]] = None,
        labels: Optional[bool] = None,
        transform: Optional[Callable[..., Any]] = None,
        max_bad_samples: int = 10,
        channels: Optional[int] = None,
    ) -> None:
        roots = [Path(each).expanduser() for each in _listed(root)]
        tarballs = [None] * len(roots) if tarball is None else _listed(tarball)
        if not roots or len(tarballs) != len(roots):
            counts = f"{len(roots)} root(s), {len(tarballs)} tarball(s)"
            raise ValueError(f"TarDataset needs a root, and a tarball for each root or none: {counts}")
        self._parts = [_open(each, prefix, suffix, path) for each, path in zip(roots, tarballs)]
        # Number of the sample behind each part.
        self._ends = np.cumsum([len(part.entries) for part in self._parts]).tolist()
        numbers = np.concatenate([part.entries[:, 0] for part in self._parts]).astype(np.int64)
        class_names = _class_names(roots, numbers)
        if labels is None:
            # Unlabelled images for pre-training, all 0, may lie in one folder with a labelled query and test set.
            labels = all((each / CLASS_IDS).exists() for each in roots) and (prefix != "pretrain" or numbers.any())
        names = class_names if labels else ()
        super().__init__(numbers if labels else None, names, transform, max_bad_samples, channels)

    def __len__(self) -> int:
        return self._ends[-1]

    def describe(self, index: int) -> str:
        part, row = self._entry(index)
        return _describe(part.tarball_of(row), row)

    def read(self, index: int) -> ImageSource:
        part, row = self._entry(index)
        tarball, start, size = part.tarball_of(row), row[2], row[3] - row[2]
        name = _describe(tarball, row)
        try:
            data = tarball.file.read(start, size)
        except OSError as error:
            raise UnreadableImageError(name, f"{type(error).__name__}: {error}") from error
        if len(data) < size:
            raise UnreadableImageError(name, f"the tarball ends within it, {len(data)} bytes behind offset {start}")
        return ImageSource(name, data)

    def _entry(self, index: int) -> tuple[_Part, list[int]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        start = 0
        for part, end in zip(self._parts, self._ends):
            if index < end:
                return part, part.entries[index - start].tolist()
            start = end
        raise IndexError(index)


def _listed(value: Any) -> list:
    return [value] if isinstance(value, (str, os.PathLike)) else list(value)


def _describe(tarball: _Tarball, row: Sequence[int]) -> str:
    """`path of the tarball!path of the member`; the index has base names, the header before the bytes the path."""
    name = tarball.names[row[1]]
    try:
        path = path_in(tarball.file.read(row[2] - BLOCK, BLOCK)) if row[2] >= BLOCK else ""
    except OSError:
        path = ""
    # A long path is cut off in the header, or was in another one before it.
    return f"{tarball.file.path}!{printable(path if base_name(path) == base_name(name) else name)}"


# --- opening --------------------------------------------------------------------------------------------------------


def _open(root: Path, prefix: Optional[str], suffix: Optional[str], tarball: Optional[PathLike]) -> _Part:
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    prefixes = [prefix, None] if prefix == "pretrain" else [prefix]
    entries_path = _first(root, [entries_name(each, suffix) for each in prefixes])
    if entries_path is None:
        raise _no_index(root, prefix, suffix, entries_name(prefix, suffix), tarball)
    entries = _read_entries(entries_path)
    tarballs: dict[int, _Tarball] = {}
    if entries.shape[1] == 5:
        if tarball is not None:
            raise ValueError(f"{entries_path} is over several tarballs, which are beside it: leave out tarball")
        for number, cohort in _cohorts(root, entries[:, 4]):
            path = _first(root, [f"{cohort}.tar", cohort])
            if path is None:
                raise FileNotFoundError(f"{root} has no {cohort}.tar, which {entries_path.name} has images of")
            tarballs[number] = _Tarball(PositionalFile(path), _names(root, [cohort], path))
    else:
        path = _tarball(root, _standard_names(prefix), tarball)
        tarballs[0] = _Tarball(PositionalFile(path), _names(root, prefixes, path))
    for number, each in tarballs.items():
        _check(entries_path, entries if len(tarballs) == 1 else entries[entries[:, 4] == number], each)
    return _Part(entries, tarballs)


def _first(root: Path, names: Sequence[str]) -> Optional[Path]:
    return next((root / name for name in names if (root / name).is_file()), None)


def _read_entries(path: Path) -> np.ndarray:
    try:
        entries = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except DAMAGE as error:  # objects, an empty or a damaged file
        raise TarError(f"{path} is no index of a tarball: {error}") from error
    if entries.dtype.kind not in "ui" or entries.ndim != 2 or entries.shape[1] not in (4, 5):
        raise TarError(
            f"{path} is no index of a tarball: it has {entries.dtype} {list(entries.shape)}, and should have uint64 "
            "[N, 4] (class index, file index, start, end) or [N, 5]"
        )
    if not len(entries):
        raise TarError(f"{path} has no entries")
    if (entries[:, 3] < entries[:, 2]).any() or entries.min() < 0 or entries.max() >= 1 << 63:
        raise TarError(f"{path} is damaged: it has offsets that make no sense")
    return entries


def _cohorts(root: Path, column: np.ndarray) -> Iterator[tuple[int, str]]:
    """Number and name of the tarballs that a column of the entries has."""
    path = root / COHORTS
    if not path.is_file():
        raise FileNotFoundError(f"{root} has entries of several tarballs, and no {COHORTS} with their names")
    names = read_names(path)
    for number in np.unique(column).tolist():
        try:
            name = names[number]
        except KeyError:
            raise TarError(f"{path} does not name tarball {number}, which the entries have") from None
        if Path(name).name != name:
            raise TarError(f"{path} names the tarball {printable(name)!r}, which is no name in its folder: refused")
        yield number, name


def _standard_names(prefix: Optional[str]) -> list[str]:
    """Of a tarball; query and test set of the clemsgrs code's online k-NN share one."""
    own = [f"{prefix}_dataset.tar", f"{prefix}.tar"] if prefix else []
    return [*own, *(["downstream_dataset.tar"] if prefix in ("query", "test") else []), "dataset.tar"]


def _tarball(root: Path, standard: Sequence[str], given: Optional[PathLike]) -> Path:
    if given is not None:
        path = root / Path(given).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no tarball {path}")
        return path
    found = _first(root, standard)
    if found is not None:
        return found
    tarballs = sorted(root.glob("*.tar"))
    if len(tarballs) == 1:
        return tarballs[0]
    problem = f"{root} has no {' or '.join(standard)}"
    if tarballs:
        problem += f": set tarball to one of {shortened([each.name for each in tarballs])}"
    for compressed in sorted([*root.glob("*.tar.*"), *root.glob("*.tgz")])[:1]:
        problem += f"; {compressed.name} is compressed: uncompress it (gunzip, unxz, unzstd)"
    raise FileNotFoundError(problem if tarballs else f"{problem}, nor another tarball: set tarball to where it is")


def _names(root: Path, prefixes: Sequence[Optional[str]], tarball: Path) -> Names:
    path = _first(root, [names_name(each) for each in prefixes])
    if path is None:
        raise _no_index(root, prefixes[0], None, names_name(prefixes[0]), tarball)
    return read_names(path)


def _no_index(
    root: Path, prefix: Optional[str], suffix: Optional[str], name: str, tarball: Optional[PathLike]
) -> FileNotFoundError:
    if tarball is None:
        others = list(root.glob("*.tar"))
        named = _first(root, [f"{prefix}_dataset.tar", f"{prefix}.tar"])
        tarball = named or (others[0] if len(others) == 1 else "NAME.tar")
    paths = [shlex.quote(os.fspath(path)) for path in (tarball, root)]
    command = f"passl-data tar-index --tarball_path {paths[0]} --output_root {paths[1]}"
    if prefix != "pretrain":
        command += f" --prefix {shlex.quote(prefix or '')}"
    if suffix:
        command += f" --restrict LIST --suffix {shlex.quote(suffix)}"
    return FileNotFoundError(f"{root} has no {name}; write the index with: {command}")


def _check(entries_path: Path, entries: np.ndarray, tarball: _Tarball) -> None:
    """Whether the entries can be of that tarball: its length, the names, and the headers of some of its files."""
    numbers = entries[:, 1]
    known = tarball.names.numbers
    unnamed = numbers.max() >= len(tarball.names) if known is None else not np.isin(numbers, known).all()
    if unnamed:
        raise TarError(f"{entries_path} has files that the file indices of {tarball.file.path} do not name")
    size, problem = tarball.file.size(), ""
    for place in np.flatnonzero(entries[:, 3] > size)[:1]:
        _, number, start, stop = entries[place, :4].tolist()
        problem = f"{tarball.names[number]!r} is at offset {start} .. {stop}, and the file ends at {size}"
    places = np.linspace(0, len(entries) - 1, _CHECKED_HEADERS).astype(int)
    for _, number, start, stop in () if problem else entries[np.unique(places), :4].tolist():
        member = header_before(tarball.file, start)
        if stop > start and (member is None or member.size not in (0, stop - start)):
            problem = f"{tarball.names[number]!r} does not start at offset {start}"
    if problem:
        raise TarError(
            f"{tarball.file.path} is not the tarball that {entries_path} is the index of, or was changed or cut off "
            f"since then ({problem}): copy it again, or write the index again with passl-data tar-index"
        )


def _class_names(roots: Sequence[Path], labels: np.ndarray) -> list[str]:
    """The class of label i at i; empty if only numbers are known."""
    name_of: dict[int, str] = {}
    for root in roots:
        path = root / CLASS_IDS
        for label, name in read_rows(path) if path.exists() else ():
            if name_of.setdefault(label, name) != name:
                raise TarError(f"{path} calls class {label} {name!r}, and another root {name_of[label]!r}")
    last = max(int(labels.max()), max(name_of, default=0))
    if not name_of or last >= _MAX_CLASSES:
        return []
    return [name_of.get(label, f"class_{label}") for label in range(last + 1)]
