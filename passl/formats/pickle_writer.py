"""Plain data as pickle operations, written one after the other, so that an array need not be in memory twice.

Operations are those of the standard library's ``pickletools``, of protocol 2; equal data give equal bytes. Nothing is
memoised: a container that occurs twice is written twice.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from passl.formats.limits import shown

_MAX_DEPTH = 100
Keys = tuple[Any, ...]


class PickleWriter(ABC):
    """Writes values; what becomes of arrays is up to the format.

    Args:
        write: takes bytes.
    """

    def __init__(self, write: Callable[[Any], Any]) -> None:
        self.write = write

    @abstractmethod
    def array(self, value: np.ndarray, path: Keys) -> None:
        """Write the operations that leave an array."""

    def other(self, value: Any, path: Keys) -> None:
        """Write anything that is neither plain data nor an array.

        Raises:
            ValueError: there is no place for it in the format.
        """
        raise ValueError(
            f"{where(path)} is a {type(value).__name__}, which the file cannot hold: it takes numbers, text, None, "
            "dicts, lists, tuples and numpy arrays"
        )

    def save(self, value: Any, path: Keys = ()) -> None:
        """Write the operations that leave ``value``; ``path`` are the keys that lead to it.

        Raises:
            ValueError: it has a part that the format has no place for; the text says where.
        """
        if len(path) > _MAX_DEPTH:
            raise ValueError(f"{where(path[:3])} is nested deeper than {_MAX_DEPTH}, or contains itself")
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, np.ndarray):
            self.array(value, path)
        elif isinstance(value, str):
            raw = value.encode("utf-8", "surrogatepass")
            self.write(pickle.BINUNICODE + len(raw).to_bytes(4, "little") + raw)
        elif type(value) in (type(None), bool, int, float):
            self.write(pickle.dumps(value, 2)[2:-1])  # without the protocol's number and the final stop
        elif isinstance(value, dict):
            self._save_dict(value, path)
        elif isinstance(value, list):
            self.write(pickle.EMPTY_LIST)
            self._save_items(value, path, pickle.APPENDS)
        elif isinstance(value, tuple):
            self._save_items(value, path, pickle.TUPLE)
        else:
            self.other(value, path)

    def name(self, module: str, name: str) -> None:
        """Write the operation that leaves a global."""
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def empty_ordered_dict(self) -> None:
        """Write the operations that leave an OrderedDict."""
        self.name("collections", "OrderedDict")
        self.write(pickle.EMPTY_TUPLE + pickle.REDUCE)

    def _save_dict(self, value: Mapping, path: Keys) -> None:
        if isinstance(value, OrderedDict):
            self.empty_ordered_dict()
        else:
            self.write(pickle.EMPTY_DICT)
        self.write(pickle.MARK)
        for key, item in value.items():
            self.save(key, (*path, key))
            self.save(item, (*path, key))
        self.write(pickle.SETITEMS)

    def _save_items(self, items: Iterable[Any], path: Keys, end: bytes) -> None:
        self.write(pickle.MARK)
        for index, item in enumerate(items):
            self.save(item, (*path, index))
        self.write(end)


def where(path: Keys) -> str:
    """The place in a value that keys lead to, for an error's text."""
    return "value" + "".join(f"[{shown(key)}]" for key in path)
