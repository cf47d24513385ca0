"""Class folders that are there already as the source of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from passl.data.image_io import image_extensions
from passl.data.public.output import PublicImage, SplitSource, Unit


def class_folder_units(root: Path, splits: Sequence[str]) -> dict[str, SplitSource]:
    """`root/<split>/<class>/<image>`, files as they are, for those of `splits` that are there."""
    return {split: class_folders(root / split) for split in splits if (root / split).is_dir()}


def class_folders(folder: Path) -> SplitSource:
    """`folder/<class>/<image>`: a unit for each class.

    Raises:
        ValueError: there are no class folders, or one without an image.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} contains no class folders")
    return SplitSource(origin=str(folder.resolve()), units=[_unit(folder / name) for name in classes])


def images_of(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted."""
    extensions = image_extensions()
    return sorted(
        Path(entry.path)
        for entry in os.scandir(folder)
        if os.path.splitext(entry.name)[1].lower() in extensions and not entry.name.startswith(".") and entry.is_file()
    )


def _unit(folder: Path) -> Unit:
    def images(before: int) -> Iterator[PublicImage]:
        files = images_of(folder)
        if not files:
            raise ValueError(f"{folder} contains no images")
        yield from (PublicImage(folder.name, file.name, file) for file in files)

    return Unit(folder.name, images)
