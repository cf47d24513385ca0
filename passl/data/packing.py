"""Memory for the views of a batch: transforms write into it, so that nothing is copied to make the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Optional

import numpy as np


class BatchMemory:
    """The arrays of one batch of `batch_size` samples, made when the first sample asks for them.

    Attributes:
        arrays: by name, float32 [V, B, ...]: view by view, as batches are ordered.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.arrays: dict[str, np.ndarray] = {}
        self._position = 0
        self._given: set[str] = set()

    @contextlib.contextmanager
    def sample(self, position: int) -> Iterator[None]:
        """Within the `with` block, `views_array` gives out the memory of the sample at `position`, each part once."""
        self._position = position
        self._given.clear()
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def give(self, name: str, shape: tuple[int, ...]) -> Optional[np.ndarray]:
        """The sample's part of the array `name`: [V, ...]; None if it is taken, or of another shape."""
        whole = (shape[0], self.batch_size, *shape[1:])
        if name not in self.arrays:
            self.arrays[name] = np.empty(whole, np.float32)
        array = self.arrays[name]
        if name in self._given or array.shape != whole:
            return None
        self._given.add(name)
        return array[:, self._position]

    def packed(self, name: str, parts: list[np.ndarray]) -> Optional[np.ndarray]:
        """[V * B, ...], if `parts` are what was given out for all samples in order; otherwise None."""
        array = self.arrays.get(name)
        if array is None or len(parts) != self.batch_size:
            return None
        if not all(_same_memory(part, array[:, position]) for position, part in enumerate(parts)):
            return None
        return array.reshape(-1, *array.shape[2:])


_current: ContextVar[Optional[BatchMemory]] = ContextVar("memory of the batch being loaded", default=None)


def views_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array for the views `name` of one image, float32 `shape` [V, ...], contents undefined.

    While a batch is being loaded it is a part of the batch's memory, otherwise an array of its own.
    """
    memory = _current.get()
    given = None if memory is None else memory.give(name, shape)
    return np.empty(shape, np.float32) if given is None else given


def _same_memory(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.strides == other.strides
        and one.ctypes.data == other.ctypes.data
    )
