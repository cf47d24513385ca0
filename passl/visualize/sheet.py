"""Several pictures as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from passl.data.datasets import ImageFolder

_GAP = 2


def contact_sheet(root: Path, target: Path, per_class: int = 4, side: int = 48) -> Path:
    """Draw the first `per_class` images of each class folder in `root` as one PNG, a column for each class.

    side: pixels of a square cell; larger images are shrunk into it, undistorted.
    """
    images = ImageFolder(root)
    cell = side + _GAP
    members = [np.flatnonzero(images.labels == label)[:per_class] for label in range(len(images.class_names))]
    rows = max(map(len, members))
    sheet = Image.new("RGB", (len(members) * cell + _GAP, rows * cell + _GAP), "white")
    for column, indices in enumerate(members):
        for row, index in enumerate(indices):
            image = images.load(index)
            image.thumbnail((side, side))
            sheet.paste(image, (_GAP + column * cell, _GAP + row * cell))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
    return target


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, on white."""
    width = max(picture.width for picture in pictures)
    height = sum(picture.height for picture in pictures) + _GAP * (len(pictures) - 1)
    whole = Image.new("RGB", (width, height), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height + _GAP
    return whole
