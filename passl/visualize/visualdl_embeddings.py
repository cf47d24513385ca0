"""Features for VisualDL's high-dimensional page, which reduces them itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np

TAG = "features"
_FILE = "vdlrecords.embeddings.log"  # VisualDL looks for this beginning


def write_embeddings(
    folder: Path, features: np.ndarray, names: Sequence[str], classes: Optional[Sequence[str]] = None, tag: str = TAG
) -> Path:
    """Write features [N, D], N > 0, with the name of each and, if given, its class; returns the file.

    VisualDL shows one file of each folder: in a folder that has the records of a run the file goes to ``embeddings``
    below it. An earlier file of this function is replaced.

    Raises:
        ValueError: there are no rows, or lengths differ.
    """
    from visualdl import LogWriter  # it brings flask, pandas and matplotlib

    columns = {**({} if classes is None else {"class": classes}), "path": names}
    if not len(features) or any(len(column) != len(features) for column in columns.values()):
        lengths = ", ".join(f"{len(column)} x {name}" for name, column in columns.items())
        raise ValueError(f"{len(features)} rows of features and {lengths}: one each, and at least one")
    if any(path.name != _FILE for path in folder.glob("*vdlrecords*")):
        folder = folder / "embeddings"
    target = folder / _FILE
    target.unlink(missing_ok=True)
    with LogWriter(logdir=str(folder), file_name=_FILE) as writer:
        writer.add_embeddings(
            tag=tag,
            mat=np.asarray(features, np.float32),
            metadata=[[_text(value) for value in column] for column in columns.values()],
            metadata_header=list(columns),
        )
    return target


def _text(value: str) -> str:
    """As Unicode, and something: its page shows no empty label."""
    return value.encode("utf-8", "replace").decode() or "no class"
