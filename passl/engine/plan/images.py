"""What there is to train on: how many images, how large, which of them can be read, and whether folders are classes."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from passl.data.datasets import ImageFiles
from passl.data.errors import UnreadableImageError
from passl.data.samples import ImageSamples
from passl.data.sources import dataset_of
from passl.engine.plan.budget import PlanError
from passl.registry import DATASETS

FEWEST = 8
_NUM_LOOKED_AT = 128
_VALIDATION_NAMES = ("val", "validation", "valid", "test")
_LARGEST_BANK, _LARGEST_VALIDATION = 10_000, 2_000
_FEWEST_LABELLED = 20


@dataclass(frozen=True)
class Labelled:
    """Labelled image files for k-NN: `bank` gives the neighbours, `validation` is classified.

    Attributes:
        bank, validation: rows (path, label, class name).
        origin: where they come from, for the reader.
        classes: how many.
    """

    bank: list[tuple[str, int, str]]
    validation: list[tuple[str, int, str]]
    origin: str
    classes: int


@dataclass(frozen=True)
class Images:
    """The images to train on.

    Attributes:
        dataset: the component of the configuration that reads them, without a transform.
        count: of all; readable: how many of them can be read, by what was looked at.
        height, width: medians, in pixels.
        looked_at, bad: how many were decoded, and (name, reason) of those that cannot be.
        labelled: for k-NN; None where there are no classes.
        no_labels: why not.
    """

    dataset: dict[str, Any]
    count: int
    height: int
    width: int
    looked_at: int
    bad: list[tuple[str, str]] = field(default_factory=list)
    labelled: Optional[Labelled] = None
    no_labels: str = ""

    @property
    def readable(self) -> int:
        return self.count - round(self.count * len(self.bad) / self.looked_at)

    @property
    def side(self) -> int:
        """The shorter side of the usual image."""
        return min(self.height, self.width)


def look(source: str, seed: int = 0) -> Images:
    """Count and sample the images of a folder, list or tarball.

    Raises:
        PlanError: there are none, too few, or none of them can be read.
    """
    try:
        # Absolute: the plan may be run from another folder.
        spec = dataset_of(os.path.abspath(os.path.expanduser(source)))
        validation = _validation_folder(spec)
        if validation is not None:
            spec["root"] = str(Path(spec["root"]) / "train")
        dataset = _build(spec)
    except (ValueError, OSError) as error:
        raise PlanError(f"{error}. Give a folder of images (in sub-folders or not), a list of them, or a tarball with "
                        "its index (passl-data tar-index)") from error  # fmt: skip
    sizes, bad = _sample(dataset)
    looked_at = len(sizes) + len(bad)
    if not sizes:
        raise PlanError(f"none of the {looked_at} images that were looked at can be read, such as {': '.join(bad[0])}")
    height, width = np.median(np.asarray(sizes), axis=0).astype(int).tolist()
    labelled, no_labels = _labelled(dataset, spec, validation, seed)
    found = Images(spec, len(dataset), height, width, looked_at, bad, labelled, no_labels)
    if found.readable < FEWEST:
        raise PlanError(
            f"{source}: {found.readable} readable image(s). DINO compares images with each other and needs at least "
            f"{FEWEST}, and some thousands to learn anything"
        )
    return found


def _build(spec: dict[str, Any]) -> ImageSamples:
    arguments = {key: value for key, value in spec.items() if key != "name"}
    return DATASETS.get(spec["name"])(**arguments)


def _validation_folder(spec: dict[str, Any]) -> Optional[Path]:
    """`val` beside `train`, where the folder holds such a pair."""
    if spec["name"] != "ImageList" or "root" not in spec or not (Path(spec["root"]) / "train").is_dir():
        return None
    folders = (Path(spec["root"]) / name for name in _VALIDATION_NAMES)
    return next((folder for folder in folders if folder.is_dir()), None)


def _sample(dataset: ImageSamples) -> tuple[list[tuple[int, int]], list[tuple[str, str]]]:
    """(height, width) of images spread over the set, decoded completely, and (name, reason) of what cannot be."""
    sizes, bad = [], []
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _NUM_LOOKED_AT)).astype(int)):
        try:
            image = dataset.read(int(index)).rgb()
            sizes.append((image.height, image.width))
        except UnreadableImageError as error:
            bad.append((error.path, error.reason))
    return sizes, bad


# --- labels ---


def _labelled(
    dataset: ImageSamples, spec: dict[str, Any], validation: Optional[Path], seed: int
) -> tuple[Optional[Labelled], str]:
    """Images for k-NN, or why there are none."""
    if not isinstance(dataset, ImageFiles):
        return None, "a tarball: docs/data.md says how a query and a test set of one are given to KNN"
    train = dataset
    if "root" in spec:
        try:
            train = DATASETS.get("ImageFolder")(root=spec["root"])
        except (ValueError, OSError) as error:
            return None, f"no class folders ({error})"
    if train.labels is None:
        return None, "the list has no column 'label'"
    rows = _rows(train)
    rng = np.random.default_rng(seed)
    origin = "drawn from the images that are trained on (without their labels)"
    if validation is not None:
        try:
            other = _rows(DATASETS.get("ImageFolder")(root=str(validation)))
        except (ValueError, OSError) as error:
            return None, f"no class folders in {validation} ({error})"
        numbers = {name: label for _, label, name in rows}
        held_out = [(path, numbers[name], name) for path, _, name in other if name in numbers]
        bank, held_out = _drawn(rows, _LARGEST_BANK, rng), _drawn(held_out, _LARGEST_VALIDATION, rng)
        origin = f"{validation}, and their neighbours from the training images"
    else:
        shuffled = _drawn(rows, _LARGEST_BANK + _LARGEST_VALIDATION, rng)
        size = min(_LARGEST_VALIDATION, len(shuffled) // 5)
        held_out, bank = shuffled[:size], shuffled[size:]
    classes = len({label for _, label, _ in bank})
    if classes < 2 or len(bank) < _FEWEST_LABELLED or not held_out:
        return None, f"{len(rows)} labelled images of {classes} class(es) are too few to measure with"
    return Labelled(bank, held_out, origin, classes), ""


def _rows(dataset: ImageFiles) -> list[tuple[str, int, str]]:
    names = dataset.class_names
    labels = dataset.labels.tolist()
    return [(path, label, names[label] if names else str(label)) for path, label in zip(dataset.paths, labels)]


def _drawn(rows: Sequence[tuple], count: int, rng: np.random.Generator) -> list[tuple]:
    """Up to `count` of them, in random order."""
    return [rows[index] for index in rng.permutation(len(rows))[:count]]


def list_text(rows: Sequence[tuple[str, int, str]]) -> str:
    """A list for ImageList: columns path, label (a number, which needs no names) and class, for people."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "class"))
    writer.writerows(rows)
    return text.getvalue()
