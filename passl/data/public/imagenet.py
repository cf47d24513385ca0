"""ImageNet (ILSVRC 2012) from the files that its users have: the official archives, or the Kaggle edition.

Training images come as `ILSVRC2012_img_train.tar`, a tar of one tar for each class, which is read as it is; unpacked
once, as a folder of `n01440764.tar`; or as class folders. Validation images come in one flat archive or folder, and
their classes in another file (see `imagenet_labels`), or as class folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from passl.data.image_io import image_extensions
from passl.data.public.archives import Archive
from passl.data.public.folders import class_folders, images_of
from passl.data.public.imagenet_labels import KAGGLE_SOLUTION, TRUTH, read_val_labels
from passl.data.public.names import last_part
from passl.data.public.output import PublicImage, SplitSource, Unit

TRAIN_ARCHIVE, VAL_ARCHIVE, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    KIT: "fa75699e90414af021442c21a62c3abf",
}
IMAGES = {"train": 1_281_167, "val": 50_000}
_PLACES = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # of train and val in the Kaggle edition
_LABELS = (KIT, KAGGLE_SOLUTION, "ILSVRC2012_devkit_t12", TRUTH, f"data/{TRUTH}")
_CLASS = re.compile(r"n\d{8}(\.tar)?")
_MAX_IMAGE = 256 << 20


class Found(NamedTuple):
    """The parts of ImageNet: archives or folders of the splits, and the file with the classes of validation images."""

    train: Optional[Path]
    val: Optional[Path]
    labels: Optional[Path]


def find(paths: Sequence[Path], labels: Optional[Path] = None) -> Found:
    """Look for the parts of ImageNet in files and folders that the user names.

    Raises:
        FileNotFoundError: there is no such file, or nothing of ImageNet in it.
        ValueError: a file is no part of ImageNet.
    """
    found = Found(None, None, labels)
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        here = _in_folder(path) if path.is_dir() else _kind(path)
        found = Found(*(known or new for known, new in zip(found, here)))
    if found.train is None and found.val is None:
        raise FileNotFoundError(
            f"nothing of ImageNet is in {', '.join(map(str, paths))}: neither {TRAIN_ARCHIVE} nor {VAL_ARCHIVE}, nor "
            "folders train or val of the Kaggle edition"
        )
    return found


def _in_folder(folder: Path) -> Found:
    train = [folder / TRAIN_ARCHIVE, *(folder / place / "train" for place in _PLACES)]
    val = [folder / VAL_ARCHIVE, *(folder / place / "val" for place in _PLACES)]
    # Kaggle's list lies three folders above train and val.
    above = [parent / KAGGLE_SOLUTION for parent in folder.resolve().parents[:4]]
    labels = next(filter(Path.exists, [*(folder / name for name in _LABELS), *above]), None)
    names = [entry.name for entry in folder.iterdir()]
    if folder.name == "val" or any("_val_" in name for name in names):
        val.append(folder)
    elif any(_CLASS.fullmatch(name) for name in names):
        train.append(folder)
    return Found(next(filter(Path.exists, train), None), next(filter(Path.exists, val), None), labels)


def _kind(path: Path) -> Found:
    """Which part a file is, by the first file in it."""
    if path.name.endswith((".csv", ".txt", ".gz", ".tgz")):
        return Found(None, None, path)
    first = next(Archive(path).members(), None)
    name = first.path if first else "nothing"
    if name.endswith(".tar"):
        return Found(path, None, None)
    if _is_image(name) and "_test_" not in name:
        return Found(None, path, None)
    raise ValueError(
        f"{path} begins with {name!r}: it is neither {TRAIN_ARCHIVE} (a tar of tars) nor {VAL_ARCHIVE} (of images)"
    )


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in image_extensions()


# --- the splits -----------------------------------------------------------------------------------------------------


def train_source(path: Path) -> SplitSource:
    """The training images in an archive of archives, a folder of archives, or class folders.

    Raises:
        ValueError: the archive is cut off or damaged, or holds anything else.
    """
    if path.is_file():
        outer = Archive(path)
        units = []
        for member in outer.members():
            name = last_part(member.path, outer.where)
            if not name.endswith(".tar"):
                raise ValueError(f"{path}: {name!r} is not the archive of a class, such as n01440764.tar")
            units.append(_class_unit(name, Archive(path, member)))
        return SplitSource(_origin(path), units, path.stat().st_size)
    archives = sorted(entry for entry in path.iterdir() if entry.suffix == ".tar" and entry.is_file())
    if archives:
        units = [_class_unit(file.name, Archive(file)) for file in archives]
        return SplitSource(_origin(path), units, sum(file.stat().st_size for file in archives))
    return class_folders(path)


def val_source(path: Path, labels: Optional[Path]) -> SplitSource:
    """The validation images in a flat archive or folder, with the file that has their classes, or in class folders.

    Raises:
        ValueError: their classes are needed and not given; or a file is damaged.
    """
    files = [] if path.is_file() else images_of(path)
    if not path.is_file() and not files:
        return class_folders(path)
    if labels is None:
        raise ValueError(
            f"{path} does not tell the classes of its images: put {KIT} of the official archives, or {KAGGLE_SOLUTION} "
            "of the Kaggle edition, beside it, or name one of them with --val-labels"
        )
    table = read_val_labels(labels)

    def images(before: int) -> Iterator[PublicImage]:
        if path.is_file():
            yield from _images(Archive(path), table.of)
        else:
            yield from (PublicImage(table.of(file.name), file.name, file) for file in files)

    size = path.stat().st_size if path.is_file() else 0
    return SplitSource(f"{_origin(path)}, classes of {labels.name}", [Unit(path.name, images)], size)


def _origin(path: Path) -> str:
    return f"{path.name}, {path.stat().st_size} bytes" if path.is_file() else str(path.resolve())


def _class_unit(name: str, archive: Archive) -> Unit:
    class_name = name[: -len(".tar")]
    return Unit(class_name, lambda before: _images(archive, lambda image: class_name))


def _images(archive: Archive, class_of: Callable[[str], str]) -> Iterator[PublicImage]:
    for member in archive.members():
        name = last_part(member.path, archive.where)
        if not _is_image(name):
            raise ValueError(f"{archive.where}: {name!r} is no image")
        if member.size > _MAX_IMAGE:
            raise ValueError(f"{archive.where}: {name!r} has {member.size} bytes: refused")
        yield PublicImage(class_of(name), name, archive.read(member))
