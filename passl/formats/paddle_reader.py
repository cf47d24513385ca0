"""Reading what ``paddle.save`` wrote, without executing anything in it."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, BinaryIO, ClassVar, Union

import numpy as np

_PARAMETER_NAMES = "StructuredToParameterName@@"  # paddle.save adds this table to every state dict


class CheckpointError(ValueError):
    """A file of weights that is missing, damaged, or does not fit; the text says which and what to do."""


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise CheckpointError(f"bytes encoded as {encoding!r}: refused")
    return text.encode("latin1")


class _Dtype:
    """Stands for numpy.dtype: numpy's own takes flags from the file that can crash the interpreter."""

    def __init__(self, code: str, *_: bool) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "fiubcSU":
            raise CheckpointError(f"arrays of {self.dtype}, not of numbers or text: refused")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray while it is read; ``values`` is the array."""

    values: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, data = state
        content = data.encode("latin1") if isinstance(data, str) else data
        flat = np.frombuffer(content, kind.dtype) if content else np.empty(0, kind.dtype)
        # A copy in this machine's byte order, that may be written to.
        self.values = flat.astype(kind.dtype.newbyteorder("=")).reshape(shape, order="F" if is_fortran else "C")


def _scalar(kind: _Dtype, data: Union[bytes, str]) -> Any:
    array = _Array()
    array.__setstate__((1, (), kind, False, data))
    return array.values[()]


class _NumpyUnpickler(pickle._Unpickler):  # the one in C makes lists as long as a number in the file says
    """Reads what ``paddle.save`` writes of numpy arrays and plain containers, and refuses every other global."""

    _ALLOWED: ClassVar = {
        ("multiarray", "_reconstruct"): lambda *_: _Array(),
        ("multiarray", "scalar"): _scalar,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "tuple"): tuple,
        ("_codecs", "encode"): _latin1_bytes,  # the bytes of an array, in pickle protocol 2
        ("__builtin__", "bytes"): lambda: b"",  # those of an empty array
    }

    def load_build(self) -> None:
        # Anything else that a file can name, such as a function here, must stay as it is.
        if not isinstance(self.stack[-2], (_Array, _Dtype)):
            raise CheckpointError("the file changes something that is no array: refused")
        super().load_build()

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        # numpy 1 pickles "numpy.core.multiarray", numpy 2 "numpy._core.multiarray".
        short = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        if (short, name) not in self._ALLOWED:
            raise CheckpointError(f"the file asks for {module}.{name}, which is no part of a file of weights: refused")
        return self._ALLOWED[short, name]


def load(file: BinaryIO) -> Any:
    """The object in ``file``, with numpy arrays for tensors.

    Raises:
        CheckpointError: the file asks for anything but arrays and plain containers.
        Exception: any: damaged bytes are instructions to pickle and numpy.
    """
    return _plain(_NumpyUnpickler(file, encoding="latin1").load(), {})


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """``value`` without wrappings: (name, array) pairs become arrays, the table of parameter names goes.

    seen: what has become of containers by their id. A few bytes can hold one ten to the power of ten times.
    """
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], _Array):
        return value[1].values
    if id(value) not in seen and isinstance(value, dict):
        seen[id(value)] = {key: _plain(item, seen) for key, item in value.items() if key != _PARAMETER_NAMES}
    elif id(value) not in seen and isinstance(value, (list, tuple)):
        seen[id(value)] = type(value)(_plain(item, seen) for item in value)
    return seen.get(id(value), value)
