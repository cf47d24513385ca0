"""Reading the state dicts among the recorded PyTorch files, with numpy alone."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from typing import Any, Union

import numpy as np

_DTYPES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "LongStorage": np.int64}


def load_torch_zip(path: Union[str, os.PathLike]) -> Any:
    """What `torch.save` wrote to `path` in the zip format (PyTorch 1.6 and later), tensors as numpy arrays.

    Only dicts of float32, float64 and int64 tensors are understood, nothing in the file is executed.

    Raises:
        pickle.UnpicklingError: the file contains anything else.
    """
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(pickled) as stream:
            return _Unpickler(stream, archive, folder=pickled[: -len("data.pkl")]).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str):
        super().__init__(stream)
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a state dict")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, dtype, key, _, size = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), dtype, size)


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """A copy of the view into `storage` (flat) that starts at `offset`; strides count elements."""
    reach = offset + sum((length - 1) * stride for length, stride in zip(shape, strides))
    if 0 not in shape and not 0 <= offset <= reach < len(storage):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches outside of its storage")
    byte_strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides).copy()
