"""What the tests of the writers write, and what is the same."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from passl.convert import BFLOAT16

TYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def arrays_of_all_kinds() -> dict[str, np.ndarray]:
    """Every type; no dimension, no number, other orders than C's."""
    generator = np.random.default_rng(0)
    arrays = {kind: generator.integers(0, 2 if kind == "bool" else 100, (3, 5)).astype(kind) for kind in TYPES}
    bits = np.arange(0x7F70, 0x7F90, dtype=np.uint16).reshape(4, 8)  # up to the infinity and beyond
    return {
        **arrays,
        "special": np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], np.float32),
        "scalar": np.array(2.5, np.float32),
        "counter": np.array(7),
        "empty": np.zeros((0, 4), np.float32),
        "fortran": np.asfortranarray(arrays["float32"]),
        "strided": np.arange(24, dtype=np.float32).reshape(4, 6).T[::2, ::-1],
        "expanded": np.broadcast_to(np.float32(3), (2, 3)),
        "bfloat16": bits.view(BFLOAT16),
        "bfloat16_transposed": bits.view(BFLOAT16).T,
    }


def assert_same(found: Any, expected: Any, path: str = "value") -> None:
    """Equal types, keys in equal order, equal bits."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray), path
        assert (found.dtype, found.shape) == (expected.dtype.newbyteorder("="), expected.shape), path
        assert found.tobytes() == expected.astype(found.dtype).tobytes(), path
        return
    assert type(found) is type(expected), path
    if isinstance(expected, argparse.Namespace):
        found, expected = vars(found), vars(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key, item in expected.items():
            assert_same(found[key], item, f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, item in enumerate(expected):
            assert_same(found[index], item, f"{path}[{index}]")
    else:
        assert repr(found) == repr(expected), path
