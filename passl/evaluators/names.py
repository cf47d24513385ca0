"""What files that are made of a data set's samples are called after."""

from __future__ import annotations

import os
from collections.abc import Sequence

from passl.data.samples import Samples


def relative_names(dataset: Samples) -> list[str]:
    """Each sample's path inside its data set, with `/`: in the data set's root or tarball, else in the deepest folder
    that all share.
    """
    described = [dataset.describe(index) for index in range(len(dataset))]
    if described and all("!" in name for name in described):
        return [os.path.normpath(name.rpartition("!")[2]) for name in described]
    paths = [os.path.abspath(name) for name in described]
    root = os.path.abspath(getattr(dataset, "root", None) or os.path.dirname(paths[0]))
    if not all(path.startswith(root.rstrip(os.sep) + os.sep) for path in paths):
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]


def check_file_name(file: str) -> None:
    """Raises ValueError if an evaluator's argument ``file`` is no name to put endings to."""
    if not file or os.path.basename(file) != file:
        raise ValueError(f"file ({file!r}) must be a name, without a folder and an ending")


def output_names(names: Sequence[str], suffix: str) -> list[str]:
    """The same with another ending.

    Raises:
        ValueError: two would be equal, or one would lie outside the folder that they are for.
    """
    first: dict[str, str] = {}
    for name in names:
        output = os.path.splitext(name)[0] + suffix
        if name.startswith(("../", "/")):
            raise ValueError(f"{name!r} is no name inside a folder")
        if output in first:
            raise ValueError(f"{first[output]!r} and {name!r} would both become {output!r}: rename one")
        first[output] = name
    return list(first)
