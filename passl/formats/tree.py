"""The last look at what a file made: only data, and such that whoever walks through it comes to an end."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np

from passl.formats.limits import CheckpointFormatError

_MAX_DEPTH = 100
_MAX_ITEMS = 10_000_000
_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset, argparse.Namespace)
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, np.ndarray, np.generic, np.dtype, PurePath)


def check_tree(root: Any) -> None:
    """Raises:
    CheckpointFormatError: ``root`` is or has something that is no data, contains itself, is nested deeper than 100, or
        has more than 10 million items when each shared part is counted as often as it occurs.
    """
    finished: dict[int, tuple[int, int]] = {}  # id -> height, items
    trail = [_Visit(root)]
    open_ids = {id(root)}
    while trail:
        visit = trail[-1]
        child = next(visit.children, visit)
        if child is visit:
            trail.pop()
            open_ids.discard(id(visit.value))
            finished[id(visit.value)] = visit.height, visit.items
            if trail:
                trail[-1].count(visit.height, visit.items)
        elif type(child) not in _CONTAINERS:
            _check_leaf(child)
            visit.count(0, 1)
        elif id(child) in open_ids:
            raise CheckpointFormatError(f"a {type(child).__name__} that contains itself: refused")
        elif id(child) in finished:
            visit.count(*finished[id(child)])
        else:
            trail.append(_Visit(child))
            open_ids.add(id(child))
        if len(trail) + visit.height > _MAX_DEPTH:
            raise CheckpointFormatError(f"objects nested deeper than {_MAX_DEPTH}: refused")
        if visit.items > _MAX_ITEMS:
            raise CheckpointFormatError(f"more than {_MAX_ITEMS} items: refused")


class _Visit:
    """A container on the way down: what of it is still to see, and what it has been found to hold."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.children = _children(value)
        self.height, self.items = 0, 1

    def count(self, height: int, items: int) -> None:
        self.height = max(self.height, height + 1)
        self.items += items


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return iter(value.values())
    if type(value) not in _CONTAINERS:
        _check_leaf(value)
        return iter(())
    return iter(value)


def _check_leaf(value: Any) -> None:
    if not isinstance(value, _LEAVES):
        name = getattr(value, "name", type(value).__name__)
        raise CheckpointFormatError(f"the file holds {name} itself, where data are expected: refused")
