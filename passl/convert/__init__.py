"""Files of other frameworks, read and written without installing those, and without executing anything in them."""

from passl.convert.lazy import Lazy
from passl.convert.limits import CheckpointFormatError
from passl.convert.paddle_writer import save_pdparams
from passl.convert.safetensors import load_safetensors, save_safetensors
from passl.convert.storage import BFLOAT16
from passl.convert.torch_reader import load_torch
from passl.convert.torch_writer import save_torch

__all__ = [
    "BFLOAT16",
    "CheckpointFormatError",
    "Lazy",
    "load_safetensors",
    "load_torch",
    "save_pdparams",
    "save_safetensors",
    "save_torch",
]
