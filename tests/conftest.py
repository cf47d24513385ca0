"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before numpy and Paddle are imported: the test processes run side by side, one thread each.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import pytest

from tests.file_server import Server, serving


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of the official code's recorded outputs (see tests/reference/README.md)."""
    return Path(os.environ.get("PASSL_REFERENCE") or Path(__file__).parent / "reference")


@pytest.fixture
def float64():
    """Layers and tensors of the test are float64."""
    import paddle

    default = paddle.get_default_dtype()
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype(default)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """A server on this machine, whose answers a test can spoil."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        yield server
