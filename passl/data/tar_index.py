"""The index of a tarball: where each of its images is, in the files that the clemsgrs code reads and writes.

`{prefix}_entries[_{suffix}].npy`: uint64 [N, 4], rows (class index, file index, start, end) in the tarball's order; the
image is the tarball's bytes `start .. end - 1`. `{prefix}_file_indices.npy`: {file index: base name} of all its files.
`class-ids.npy`: rows (label, class name).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

import numpy as np

from passl.data.image_io import image_extensions
from passl.data.tar_lists import Labels, NameList, base_name, shortened
from passl.data.tar_members import DIRECTORY, FILE, HARD_LINK, SPARSE, Member, TarError, TarWalk, printable
from passl.data.tar_names import Names, NamesBuilder, read_names, read_rows, write_names, write_rows
from passl.formats.atomic import replacing

PathLike = Union[str, os.PathLike]
CLASS_IDS = "class-ids.npy"
COHORTS = "cohort_indices.npy"
_PROGRESS_EVERY = 1024  # members


@dataclass
class TarIndex:
    """What `index_tarball` wrote, and what there is to know about it.

    `files`: files in the tarball; `entries`: of those, in the index; `notes`: what was left out, and other remarks.
    """

    entries_path: Path
    names_path: Path
    class_ids_path: Optional[Path]
    files: int
    entries: int
    classes: int
    notes: list[str] = field(default_factory=list)


def entries_name(prefix: Optional[str], suffix: Optional[str] = None) -> str:
    """Of the file of entries."""
    return "_".join(part for part in (prefix, "entries", suffix) if part) + ".npy"


def names_name(prefix: Optional[str]) -> str:
    """Of the file of names."""
    return f"{prefix}_file_indices.npy" if prefix else "file_indices.npy"


def index_tarball(
    tarball: PathLike,
    output_root: PathLike,
    prefix: Optional[str] = "pretrain",
    suffix: Optional[str] = None,
    keep: Optional[NameList] = None,
    remove: Optional[NameList] = None,
    labels: Optional[Labels] = None,
    skip_special: bool = False,
    ignore_zeros: bool = False,
    force: bool = False,
    progress: Optional[Callable[[int, int], None]] = None,
) -> TarIndex:
    """Write the index of `tarball` into the folder `output_root`, which is made if it is missing.

    All regular files are numbered and, unless a list says otherwise, in the index, images or not, as in the clemsgrs
    code; folders, symbolic links and devices are not. Files are written whole or not at all.

    Args:
        prefix, suffix: of the names of the index's files; a suffix is for a part of the tarball, such as a fold.
        keep, remove: the files to take, or to leave out; not both.
        labels: `CsvLabels`, `FolderLabels` or the like; without, all class indices are 0.
        skip_special: leave out hard links and sparse files instead of raising.
        ignore_zeros: read on behind the end of the archive.
        force: overwrite the index of another tarball, and other classes.
        progress: called with the bytes passed and all bytes, now and then.

    Raises:
        TarError: the tarball is damaged, cut off, compressed or holds what cannot be indexed; a list does not fit it;
            the index of another tarball is in the way.
        OSError: something cannot be read or written.
    """
    if keep is not None and remove is not None:
        raise ValueError("give the files to keep or those to remove, not both")
    walk = TarWalk(tarball, ignore_zeros)
    scan = _Scan(walk, keep, remove, labels, skip_special)
    for count, member in enumerate(walk):
        scan.take(member)
        if progress is not None and count % _PROGRESS_EVERY == 0:
            progress(walk.offset, walk.size)
    if progress is not None:
        progress(walk.size, walk.size)
    entries, class_ids = scan.finish()
    root = Path(output_root).expanduser()
    index = TarIndex(
        root / entries_name(prefix, suffix),
        root / names_name(prefix),
        root / CLASS_IDS if class_ids else None,
        files=scan.files,
        entries=len(entries),
        classes=len(class_ids),
        notes=scan.notes(),
    )
    _write(index, entries, scan.names.build(), class_ids, os.fspath(tarball), force)
    return index


class _Scan:
    """Collects the entries of one walk; 40 bytes and its name for each file."""

    def __init__(
        self,
        walk: TarWalk,
        keep: Optional[NameList],
        remove: Optional[NameList],
        labels: Optional[Labels],
        skip_special: bool,
    ) -> None:
        self._walk, self._keep, self._remove, self._labels = walk, keep, remove, labels
        self._skip_special = skip_special
        self.names = NamesBuilder()
        self.files = 0
        self._entries = array("Q")
        self._left_out: dict[str, list[str]] = {}
        self._not_images: list[str] = []
        self._extensions = image_extensions()

    def take(self, member: Member) -> None:
        if member.kind != FILE:
            if member.kind != DIRECTORY:
                self._leave_out(member)
            return
        name = base_name(member.path)
        number = self.files
        self.files += 1
        self.names.add(number, name.encode("utf-8", "surrogatepass"))
        if self._keep is not None and member.path not in self._keep:
            return
        if self._remove is not None and member.path in self._remove:
            return
        label = 0 if self._labels is None else self._labels.number(member.path)
        if "." + name.rpartition(".")[2].lower() not in self._extensions:
            self._not_images.append(printable(member.path))
        self._entries.extend((label, number, member.start, member.start + member.size))

    def _leave_out(self, member: Member) -> None:
        path = printable(member.path)
        if not self._skip_special and member.kind == HARD_LINK:
            raise TarError(
                f"{self._walk.path}: {path!r} is a hard link to {printable(member.link)!r} and has no bytes of its "
                "own: pack again with tar --hard-dereference, or add --skip_special to leave out hard links and "
                "sparse files"
            )
        if not self._skip_special and member.kind == SPARSE:
            raise TarError(
                f"{self._walk.path}: {path!r} is a sparse file, whose bytes are not in one piece: pack again "
                "without -S (--sparse), or add --skip_special to leave out hard links and sparse files"
            )
        self._left_out.setdefault(member.kind, []).append(path)

    def finish(self) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Entries [N, 4] and (label, class name) of the classes."""
        path = self._walk.path
        if not self.files:
            raise TarError(f"{path} holds no files")
        entries = np.frombuffer(self._entries, np.uint64).reshape(-1, 4)  # no copy
        if not len(entries):
            chosen = self._keep or self._remove
            raise TarError(f"none of the {self.files} files in {path} is left by {chosen.path}")
        if self._labels is None:
            return entries, []
        entries[:, 0], class_ids = self._labels.finish(entries[:, 0].astype(np.int64))
        return entries, class_ids

    def notes(self) -> list[str]:
        notes = [f"left out: {len(paths)} {kind}(s): {shortened(paths)}" for kind, paths in self._left_out.items()]
        if self._not_images:
            notes.append(
                f"{len(self._not_images)} file(s) without an image's extension are in the index: "
                f"{shortened(self._not_images)}. Leave them out with --remove"
            )
        for chosen in (self._keep, self._remove):
            if chosen is not None and chosen.unmet():
                unmet = chosen.unmet()
                notes.append(f"{len(unmet)} name(s) of {chosen.path} are not in the tarball: {shortened(unmet)}")
        if not self._walk.has_end:
            notes.append(
                f"the blocks of zeros that end an archive are missing at offset {self._walk.size}, behind "
                f"{printable(self._walk.last)!r}: it may be cut off"
            )
        return notes


def join_indices(
    output_root: PathLike, tarballs: Sequence[PathLike], prefix: str = "pretrain", suffix: Optional[str] = None
) -> Path:
    """Write one file of entries over several tarballs whose indices, with their stems as prefixes, are in a folder.

    `{prefix}_entries[_{suffix}].npy`: uint64 [N, 5], as those of the tarballs, with the number of the tarball;
    `cohort_indices.npy`: {number: stem of the tarball}. Returns the path of the entries.

    Raises:
        TarError: two tarballs have one stem, or one that is the prefix.
        OSError: an index is missing, or cannot be written.
    """
    root = Path(output_root).expanduser()
    stems = [Path(tarball).stem for tarball in tarballs]
    if len({*stems, prefix}) <= len(stems):
        raise TarError(f"tarballs need names of their own, other than {prefix!r}: {shortened(stems)}")
    cohorts, joined = NamesBuilder(), []
    for number, stem in enumerate(stems):
        cohorts.add(number, stem.encode("utf-8", "surrogatepass"))
        entries = np.load(root / entries_name(stem, suffix), mmap_mode="r", allow_pickle=False)
        joined.append(np.pad(entries, ((0, 0), (0, 1)), constant_values=number))
    with replacing(root / COHORTS) as file:
        write_names(file, cohorts.build())
    path = root / entries_name(prefix, suffix)
    with replacing(path) as file:
        np.save(file, np.concatenate(joined))
    return path


# --- files ----------------------------------------------------------------------------------------------------------


def _write(
    index: TarIndex, entries: np.ndarray, names: Names, class_ids: list[tuple[int, str]], tarball: str, force: bool
) -> None:
    index.entries_path.parent.mkdir(parents=True, exist_ok=True)
    if class_ids:
        class_ids = _merged(index.class_ids_path, class_ids, force)
    if not force and index.names_path.exists() and read_names(index.names_path) != names:
        raise TarError(
            f"{index.names_path} is the index of another tarball than {tarball}, or of an earlier state of it: choose "
            "another --prefix or --output_root, or add --force to overwrite it"
        )
    with replacing(index.names_path) as file:
        write_names(file, names)
    if class_ids:
        with replacing(index.class_ids_path) as file:
            write_rows(file, class_ids)
    # Last: whoever finds the entries finds the rest.
    with replacing(index.entries_path) as file:
        np.save(file, entries)


def _merged(path: Path, class_ids: list[tuple[int, str]], force: bool) -> list[tuple[int, str]]:
    """`class_ids` and what is at `path` already: the indices of one folder share their classes."""
    if force or not path.exists():
        return class_ids
    name_of = dict(read_rows(path))
    for label, name in class_ids:
        if name_of.setdefault(label, name) != name:
            raise TarError(
                f"{path} calls class {label} {name_of[label]!r}, and the labels call it {name!r}: the indices in one "
                "folder share their classes. Choose another --output_root, or add --force to overwrite them"
            )
    return list(name_of.items())
