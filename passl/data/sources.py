"""What a path given by the user is: a folder of images, a list, or tarballs; as the data set that reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional, Union

LIST_ENDINGS = (".csv", ".txt", ".lst")


def dataset_of(source: Union[str, os.PathLike]) -> dict[str, Any]:
    """The data set that reads `source`, as a configuration names it: `{name: ImageList, root: ...}`.

    Raises:
        ValueError: it is nothing of the kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        prefix = index_prefix(path)
        if prefix is not None:
            return {"name": "TarDataset", "root": str(path), "prefix": prefix}
        return {"name": "ImageList", "root": str(path)}
    if path.is_file() and path.suffix.lower() in LIST_ENDINGS:
        return {"name": "ImageList", "list_file": str(path)}
    if path.is_file() and path.suffix.lower() == ".tar":
        return {
            "name": "TarDataset",
            "root": str(path.resolve().parent),
            "prefix": index_prefix(path.parent) or "pretrain",
            "tarball": str(path.resolve()),
        }
    what = "is no folder, list (.csv, .txt) or tarball" if path.exists() else "is not there"
    raise ValueError(f"{source} {what}")


def index_prefix(folder: Path) -> Optional[str]:
    """The prefix of the index that `passl-data tar-index` wrote to `folder`; None where there is none."""
    if (folder / "entries.npy").is_file() or (folder / "pretrain_entries.npy").is_file():
        return "pretrain"
    ending = "_entries.npy"
    return next((path.name[: -len(ending)] for path in sorted(folder.glob(f"*{ending}"))), None)
