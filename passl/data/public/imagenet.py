"""ImageNet (ILSVRC 2012) from the files that its users have: the official archives, or the Kaggle edition.

Training images come as `ILSVRC2012_img_train.tar`, a tar of one tar for each class, which is read as it is; unpacked
once, as a folder of `n01440764.tar`; or as class folders. Validation images come in one flat archive or folder, and
their classes in another file (see `imagenet_labels`), or as class folders.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Optional

from passl.data.image_io import image_extensions
from passl.data.public.archives import Member, Section, members, read_member
from passl.data.public.folders import class_folders, images_of
from passl.data.public.imagenet_labels import KAGGLE_SOLUTION, META, TRUTH, ValLabels, read_val_labels
from passl.data.public.names import last_part
from passl.data.public.output import PublicImage, SplitSource, Unit

TRAIN_ARCHIVE, VAL_ARCHIVE, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    KIT: "fa75699e90414af021442c21a62c3abf",
}
IMAGES = {"train": 1_281_167, "val": 50_000}
_FOLDERS = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_LABEL_FILES = (KIT, KAGGLE_SOLUTION, "ILSVRC2012_devkit_t12", TRUTH, f"data/{TRUTH}")
_MAX_IMAGE = 256 << 20


class Found(NamedTuple):
    """What was found of ImageNet: archives or folders of the two splits, and the classes of validation images."""

    train: Optional[Path]
    val: Optional[Path]
    labels: Optional[Path]


def find(paths: Sequence[Path], labels: Optional[Path] = None) -> Found:
    """Look for the parts of ImageNet in files and folders that the user names.

    Raises:
        FileNotFoundError: there is no such file, or nothing of ImageNet.
        ValueError: a file is no part of it.
    """
    train = val = None
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        if path.is_dir():
            train = train or _first(path, ("ILSVRC2012_img_train.tar", *_in_folders("train")), _holds_training)
            val = val or _first(path, ("ILSVRC2012_img_val.tar", *_in_folders("val")), _holds_images)
            labels = labels or _first(path, _LABEL_FILES, Path.exists)
            if train is None and _holds_training(path):
                train = path
            continue
        kind = _kind(path)
        if kind == "train":
            train = path
        elif kind == "val":
            val = path
        else:
            labels = labels or path
    if train is None and val is None:
        raise FileNotFoundError(f"{', '.join(map(str, paths))}: nothing of ImageNet is there")
    return Found(train, val, labels)


def _in_folders(name: str) -> list[str]:
    return [f"{folder}/{name}" for folder in _FOLDERS]


def _first(root: Path, names: Sequence[str], holds: Callable[[Path], bool]) -> Optional[Path]:
    return next((root / name for name in names if holds(root / name)), None)


def _holds_training(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(_is_class_archive(entry) or entry.is_dir() for entry in path.iterdir()
                                                    if entry.name.startswith("n")))


def _holds_images(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _is_class_archive(path: Path) -> bool:
    return path.suffix == ".tar" and path.is_file()


def _kind(path: Path) -> str:
    """Of a file that the user names: by what its first member is."""
    if path.name.endswith((".csv", ".txt", ".gz", ".tgz")):
        return "labels"
    with path.open("rb") as file:
        first = next(members(file, str(path)), None)
    if first is None:
        raise ValueError(f"{path} is an archive without files")
    if first.name.endswith(".tar"):
        return "train"
    if _is_image(first.name) and "_test_" not in first.name:
        return "val"
    raise ValueError(
        f"{path} holds {first.name!r}: it is neither {TRAIN_ARCHIVE} (a tar of tars) nor {VAL_ARCHIVE} (images)"
    )


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in image_extensions()


# --- the splits -----------------------------------------------------------------------------------------------------


def train_source(path: Path) -> SplitSource:
    """The training images in an archive of archives, a folder of archives, or class folders."""
    if path.is_file():
        size = path.stat().st_size
        with path.open("rb") as file:
            inner = list(members(file, str(path)))
        wrong = [member.name for member in inner if not member.name.endswith(".tar")]
        if wrong or not inner:
            raise ValueError(f"{path} should hold an archive for each class, such as n01440764.tar, and has {wrong[:1]}")
        units = [_class_unit(last_part(member.name, str(path)), path, member) for member in inner]
        return SplitSource(f"{path.name}, {size} bytes", units, size)
    archives = sorted(entry for entry in path.iterdir() if _is_class_archive(entry))
    if archives:
        units = [_class_unit(file.name, file, None) for file in archives]
        return SplitSource(str(path.resolve()), units, sum(file.stat().st_size for file in archives))
    return class_folders(path)


def _class_unit(name: str, archive: Path, member: Optional[Member]) -> Unit:
    class_name = name[: -len(".tar")]

    def images(before: int) -> Iterator[PublicImage]:
        with archive.open("rb") as outer:
            file: BinaryIO = outer
            where = str(archive)
            if member:
                file = io.BufferedReader(Section(outer, member.start, member.size), 1 << 20)
                where = f"{archive}: {member.name}"
            yield from _images(file, where, lambda _: class_name)

    return Unit(class_name, images)


def _images(file: BinaryIO, where: str, class_of: Callable[[str], str]) -> Iterator[PublicImage]:
    for member in members(file, where):
        name = last_part(member.name, where)
        if not _is_image(name):
            raise ValueError(f"{where}: {name!r} is no image")
        if member.size > _MAX_IMAGE:
            raise ValueError(f"{where}: {name!r} has {member.size} bytes: refused")
        yield PublicImage(class_of(name), name, read_member(file, member))


def val_source(path: Path, labels: Optional[Path]) -> SplitSource:
    """The validation images in a flat archive or folder, with the file that has their classes, or in class folders.

    Raises:
        ValueError: their classes are needed and not given.
    """
    flat = path.is_file() or bool(images_of(path))
    if not flat:
        return class_folders(path)
    if labels is None:
        raise ValueError(
            f"{path} does not tell the classes of its images: put {KIT} (or {KAGGLE_SOLUTION} of the Kaggle edition) "
            "beside it, or name one with --val-labels"
        )
    table = read_val_labels(labels)

    def images(before: int) -> Iterator[PublicImage]:
        if path.is_file():
            with path.open("rb") as file:
                yield from _images(file, str(path), table.of)
        else:
            yield from (PublicImage(table.of(image.name), image.name, image) for image in images_of(path))

    size = path.stat().st_size if path.is_file() else 0
    origin = f"{path.name}, {size} bytes" if size else str(path.resolve())
    return SplitSource(f"{origin}, classes of {labels.name}", [Unit(path.name, images)], size)


__all__ = ["IMAGES", "KIT", "MD5", "META", "TRAIN_ARCHIVE", "VAL_ARCHIVE", "Found", "ValLabels", "find", "train_source", "val_source"]
