"""Files with the features of one region, `[n, D]`: what `RegionFeatures` reads and the evaluators write."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from passl.data.image_io import UnreadableImageError
from passl.formats.atomic import replacing
from passl.formats.torch_reader import load_torch
from passl.formats.torch_writer import save_torch

FORMATS = (".npy", ".npz", ".pt")
_MAX_BYTES = 1 << 30  # of one inflated array: a few bytes of a hostile npz may claim to be any amount


def read_features(path: Union[str, os.PathLike], key: Optional[str] = None) -> np.ndarray:
    """The array of a `.npy`, `.npz` or `.pt` file, with nothing in it executed. Those of npy files, and of most pt
    files, are mapped into memory, and not read.

    Args:
        key: which array of a file that has several by name (npz, or a dict of tensors).

    Raises:
        UnreadableImageError: the file is missing, damaged, of another kind, or holds anything but one array of floats;
            names it.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FORMATS:
        raise UnreadableImageError(path, f"features are read from files that end in {', '.join(FORMATS)}")
    try:
        array = _READERS[suffix](path, key)
    except UnreadableImageError:
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError(path, "no such file") from error
    # What numpy, zipfile and zlib raise for damaged files; the errors of load_torch are ValueErrors.
    except (
        OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, OverflowError, MemoryError,
        NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = str(error).replace(f"{path}: ", "", 1).split("\n")[0]
        raise UnreadableImageError(path, f"{type(error).__name__}: {reason:.200}") from error
    if array.dtype.kind != "f":
        raise UnreadableImageError(path, f"features must be floats, and these are {array.dtype}")
    return array


def write_features(path: Path, features: np.ndarray) -> None:
    """Write `features` as npy, npz (under the name `features`) or pt, by the ending of `path`; whole or not at all."""
    if path.suffix == ".pt":
        save_torch(features, path)
        return
    with replacing(path) as file:
        if path.suffix == ".npy":
            np.save(file, features, allow_pickle=False)
        else:
            np.savez(file, features=features)


def _read_npy(path: str, key: Optional[str]) -> np.ndarray:
    # Not np.load: by its first bytes it would take the file for something else.
    return np.asarray(np.lib.format.open_memmap(path, mode="r"))


def _read_npz(path: str, key: Optional[str]) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename[: -len(".npy")]: info for info in archive.infolist() if info.filename.endswith(".npy")}
        member = members[_chosen(path, list(members), key)]
        if member.file_size > _MAX_BYTES:
            raise UnreadableImageError(path, f"{member.file_size} bytes of features: more than {_MAX_BYTES}")
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _read_pt(path: str, key: Optional[str]) -> np.ndarray:
    value: Any = load_torch(path)
    if isinstance(value, Mapping):
        arrays = {str(name): item for name, item in value.items() if isinstance(item, np.ndarray)}
        value = arrays[_chosen(path, list(arrays), key)]
    if not isinstance(value, np.ndarray):
        raise UnreadableImageError(path, f"holds a {type(value).__name__}, not a tensor")
    return value


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".pt": _read_pt}


def _chosen(path: str, names: list[str], key: Optional[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    if key is not None and key not in names:
        raise UnreadableImageError(path, f"has no array {key!r}; it has {shown}")
    if key is None and len(names) != 1:
        raise UnreadableImageError(path, f"must hold one array and has {len(names)} ({shown}): say which with 'key'")
    return names[0] if key is None else key
