"""The labels of two data sets, which must mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_labelled(train_dataset: Any, val_dataset: Any) -> None:
    """Raises ValueError for data sets without labels, with labels below 0, or whose classes may not be the same."""
    for name, dataset in (("train_dataset", train_dataset), ("val_dataset", val_dataset)):
        if dataset.labels is None:
            raise ValueError(f"{name} has no labels: use class folders (ImageFolder) or a csv (ImageList)")
        unlabelled = int((np.asarray(dataset.labels) < 0).sum())
        if unlabelled:
            raise ValueError(f"labels must be from 0, and {unlabelled} of {name} are below")
    _check_classes(train_dataset, val_dataset)


def _check_classes(train_dataset: Any, val_dataset: Any) -> None:
    """Labels are positions in the class names, which must be the same ones, or numbers that need no names."""
    train, val = list(train_dataset.class_names), list(val_dataset.class_names)
    if train and val and train != val:
        differing = sorted(set(train) ^ set(val))
        reason = f"only in one of them: {', '.join(differing[:10])}" if differing else "their order is not the same"
        raise ValueError(
            f"the {len(train)} training and {len(val)} validation classes differ, so labels would not agree; {reason}"
        )
    names = train or val
    # Folders "0", "1", ... are in the order of their numbers up to "9" only.
    if bool(train) != bool(val) and names != [str(label) for label in range(len(names))]:
        named, numbered = ("train_dataset", "val_dataset") if train else ("val_dataset", "train_dataset")
        raise ValueError(
            f"{named} has class names ({', '.join(names[:10])}) and {numbered} has numbers as labels, so they might "
            "not agree: use names in both or numbers in both"
        )
