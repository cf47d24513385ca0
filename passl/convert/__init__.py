"""Files of other frameworks: reading, converting and writing them without installing those, and without executing
anything in them.
"""

from passl.convert.limits import CheckpointFormatError
from passl.convert.safetensors import load_safetensors
from passl.convert.torch_reader import load_torch

__all__ = ["CheckpointFormatError", "load_safetensors", "load_torch"]
