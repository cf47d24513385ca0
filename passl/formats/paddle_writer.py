"""Paddle's files without Paddle: pickles as ``paddle.save`` writes them (paddle/framework/io.py)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import numpy as np

from passl.formats.atomic import replacing
from passl.formats.pickle_writer import Keys, PickleWriter, where
from passl.formats.storage import checked_element, content

_PARAMETER_NAMES = "StructuredToParameterName@@"
# Paddle saves bfloat16 as its bits and so takes every uint16 for bfloat16; it has no wider unsigned types.
_KNOWN = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
)


def save_pdparams(value: Mapping[Any, Any], path: Union[str, Path]) -> None:
    """Write a ``.pdparams``, ``.pdopt`` or ``.pdstates`` file: ``paddle.load`` gives its arrays as tensors.

    Args:
        value: numbers, text, None, numpy arrays and dicts, lists and tuples of those. The name
            of a tensor is its key, or, where dicts are nested, the keys that lead to it, joined by dots.

    A state dict, where every value is an array, has the form that plain ``pickle.load`` reads as name -> array; other
    values have the one that Paddle gives them since 2.1. Equal values, in equal order, give equal bytes. Arrays are
    written one after the other; the file replaces what is at ``path`` when it is whole.

    Raises:
        ValueError: a part of the value has no place in such a file; the text says which.
        OSError: the disk is full, or the folder missing or read-only.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a file of Paddle holds a dict (name -> array, say), not a {type(value).__name__}")
    if _PARAMETER_NAMES in value:
        raise ValueError(f"the key {_PARAMETER_NAMES!r} is Paddle's own: leave it out, it is written where it belongs")
    is_state_dict = all(isinstance(item, np.ndarray) for item in value.values())
    if is_state_dict:
        value = {**value, _PARAMETER_NAMES: {key: str(key) for key in value}}
    with replacing(Path(path)) as file:
        file.write(pickle.PROTO + b"\x04")
        _PaddlePickle(file.write, named=not is_state_dict).save(value)
        file.write(pickle.STOP)


class _PaddlePickle(PickleWriter):
    """``named``: an array is a pair of its name and itself, which is what Paddle takes for a tensor."""

    def __init__(self, write: Any, named: bool) -> None:
        super().__init__(write)
        self._named = named

    def array(self, value: np.ndarray, path: Keys) -> None:
        element = checked_element(value, where(path), _KNOWN)
        if self._named:
            self.save(".".join(map(str, path)))
        # As numpy does, but with the bytes last and in one piece; numpy.core is known to numpy 1 and 2.
        self.name("numpy.core.multiarray", "_reconstruct")
        self.name("numpy", "ndarray")
        self.save((0,))
        self.write(pickle.SHORT_BINBYTES + b"\x01b" + pickle.TUPLE3 + pickle.REDUCE)
        self.write(pickle.MARK)
        self.save(1)
        self.save(tuple(value.shape))
        self.name("numpy", "dtype")
        self.save((("|b1" if element.name == "bool" else element.raw.str), False, True))
        self.write(pickle.REDUCE)
        self.save(False)  # not in Fortran's order
        data = content(value)
        self.write(pickle.BINBYTES8 + data.size.to_bytes(8, "little"))
        self.write(data)
        self.write(pickle.TUPLE + pickle.BUILD)
        if self._named:
            self.write(pickle.TUPLE2)
