"""Files of other frameworks: read, converted and written without installing those, and without executing anything in
them.
"""

from typing import Any

from passl.formats.limits import CheckpointFormatError
from passl.formats.paddle_writer import save_pdparams
from passl.formats.safetensors import load_safetensors, save_safetensors
from passl.formats.storage import BFLOAT16
from passl.formats.torch_reader import load_torch
from passl.formats.torch_writer import save_torch

# These know the architectures and so import Paddle, which reading and writing files does not need.
_WITH_PADDLE = {
    "TORCH_SUFFIXES": "source",
    "ConversionError": "report",
    "convert": "api",
    "find_file": "source",
    "read_backbone": "api",
    "read_weights": "api",
}

__all__ = [
    "BFLOAT16",
    "CheckpointFormatError",
    "load_safetensors",
    "load_torch",
    "save_pdparams",
    "save_safetensors",
    "save_torch",
    *_WITH_PADDLE,
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_PADDLE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"passl.convert.{_WITH_PADDLE[name]}"), name)
