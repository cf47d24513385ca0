"""Arrays to be written, also such as exist only while they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

import numpy as np

from passl.convert.storage import Element, element_of


@dataclass(frozen=True, eq=False)
class Lazy:
    """An array that ``function`` makes when it is written, and that is gone afterwards: a transposed weight, say.

    Args:
        function: takes nothing, returns the array.
        shape, dtype: of that array; known before it is made, as sizes come first in a file.
    """

    function: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype

    def materialise(self) -> np.ndarray:
        """The array.

        Raises:
            ValueError: it is not of the announced shape and dtype.
        """
        array = self.function()
        if array.shape != tuple(self.shape) or array.dtype != self.dtype:
            raise ValueError(
                f"a Lazy of shape {tuple(self.shape)} and type {np.dtype(self.dtype)} made an array of shape "
                f"{array.shape} and type {array.dtype}: give it those"
            )
        return array


Array = Union[np.ndarray, Lazy]


def checked_element(value: Array, where: str, known: tuple[str, ...]) -> Element:
    """The type of an array's numbers.

    Raises:
        ValueError: it is none of ``known``; the text says ``where``.
    """
    element = element_of(np.dtype(value.dtype))
    if element is None or element.name not in known:
        raise ValueError(f"{where} has numbers of type {value.dtype}, must be one of {', '.join(known)}: use .astype")
    return element


def content(value: Array) -> np.ndarray:
    """The bytes of an array in C order and little endian; a view of it where it has them so in memory."""
    array = value.materialise() if isinstance(value, Lazy) else value
    dense = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    return dense.reshape(-1).view(np.uint8)
