"""The allow-list: every global that a file of weights may name, and what is built in its place.

What PyTorch's own objects become: a Size a tuple, a device and a dtype their text ("cuda:0", "torch.float32"), a
Parameter its array. An argparse.Namespace is one, with nothing but attributes in it.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, Union

import numpy as np

from passl.formats.limits import Budget, CheckpointFormatError, shown
from passl.formats.pickle_machine import Global, add_items, checked_key
from passl.formats.storage import ELEMENTS, MAX_DIMENSIONS, Element

_NUMPY_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16)|[SU][1-9][0-9]{0,5})")
_ITEM_BYTES = 64  # of a list, a set or a dict, about
_MAX_DEVICE_NAME = 32
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
# Where Lightning has had its dict of hyper-parameters.
_LIGHTNING = (
    "pytorch_lightning.utilities.parsing",
    "lightning_fabric.utilities.data",
    "lightning.fabric.utilities.data",
)
# What else PyTorch names in a file, and why it has no place here.
_REFUSED = {
    ("torch._utils", "_rebuild_sparse_tensor"): "a sparse tensor",
    ("torch._utils", "_rebuild_sparse_csr_tensor"): "a sparse tensor",
    ("torch._utils", "_rebuild_nested_tensor"): "a nested tensor",
    ("torch._utils", "_rebuild_qtensor"): "a quantised tensor",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "a tensor on the device 'meta', which has no numbers",
}


class StorageType(NamedTuple):
    """What stands in for a class of storages."""

    name: str
    element: Element


class Globals:
    """The table for :class:`PickleMachine`, for one file."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        # Arrays and dtypes that are made but not yet filled, by id.
        self._unfilled: dict[int, Union[np.ndarray, np.dtype]] = {}
        self.table: dict[tuple[str, str], Any] = {}
        self._add_python()
        self._add_numpy()
        self._add_torch()

    def build(self, target: Any, state: Any) -> None:
        """Set ``state`` on an object that was made before, as its class would."""
        if type(target) is argparse.Namespace:
            if type(state) is not dict or not all(_is_attribute(name) for name in state):
                raise CheckpointFormatError("an argparse.Namespace with attributes that are none")
            self._budget.spend(_ITEM_BYTES * len(state))
            vars(target).update(state)
        elif self._unfilled.pop(id(target), None) is not None:
            fill = _fill_array if isinstance(target, np.ndarray) else _set_byte_order
            self._budget.spend(fill(target, state))
        elif type(target) is not OrderedDict:  # the attributes of one (state_dict's _metadata) are no weights
            raise CheckpointFormatError(f"a pickle that changes a {type(target).__name__}")

    def finish(self) -> None:
        """Raises:
        CheckpointFormatError: an array was announced and never filled.
        """
        if any(isinstance(value, np.ndarray) for value in self._unfilled.values()):
            raise CheckpointFormatError("a numpy array without content")

    # --- Python ---

    def _add_python(self) -> None:
        for module in ("builtins", "__builtin__"):
            for kind in (list, tuple, set, frozenset, bytes, bytearray):
                self._function(module, kind.__name__, self._container(kind))
            self._function(module, "dict", lambda items=(): dict(self._ordered_dict(items)))
            self._function(module, "complex", _complex)
            self._function(module, "object", _refused("an object of no class"))
        for module in ("copyreg", "copy_reg"):
            self._function(module, "_reconstructor", _reconstructed)
        self._function("collections", "OrderedDict", self._ordered_dict)
        self._function("collections", "defaultdict", lambda factory=None: {})
        self._function("collections", "Counter", lambda items=(): dict(self._ordered_dict(items)))
        for module in _LIGHTNING:
            self._function(module, "AttributeDict", self._ordered_dict)
        self._function("argparse", "Namespace", argparse.Namespace)
        self._function("_codecs", "encode", self._latin1)
        for module in ("pathlib", "pathlib._local"):
            for name in ("PosixPath", "PurePosixPath"):
                self._function(module, name, self._path(PurePosixPath))
            for name in ("WindowsPath", "PureWindowsPath"):
                self._function(module, name, self._path(PureWindowsPath))

    def _function(self, module: str, name: str, build: Callable[..., Any]) -> None:
        self.table[module, name] = Global(f"{module}.{name}", build)

    def _container(self, kind: type) -> Callable[..., Any]:
        def build(items: Any = ()) -> Any:
            if type(items) not in (list, tuple, set, frozenset, bytes, bytearray):
                raise CheckpointFormatError(f"a {kind.__name__} of a {type(items).__name__}")
            self._budget.spend(_ITEM_BYTES * len(items))
            return kind(map(checked_key, items) if kind in (set, frozenset) else items)

        return build

    def _path(self, kind: type) -> Callable[..., Any]:
        def build(*parts: str) -> Any:
            self._budget.spend(sum(map(len, parts)))
            return kind(*parts)

        return build

    def _ordered_dict(self, items: Any = ()) -> OrderedDict:
        self._budget.spend(_ITEM_BYTES * len(items))
        result: OrderedDict = OrderedDict()
        add_items(result, items.items() if isinstance(items, dict) else items)
        return result

    def _latin1(self, text: str, encoding: str) -> bytes:
        """How pickle protocol 2 writes bytes."""
        if encoding != "latin1":
            raise CheckpointFormatError(f"bytes encoded as {shown(encoding)}: refused")
        self._budget.spend(len(text))
        return text.encode("latin1")

    # --- numpy ---

    def _add_numpy(self) -> None:
        array_type = Global("numpy.ndarray", _refused("an array that numpy does not write so"))
        self.table["numpy", "ndarray"] = array_type
        self._function("numpy", "dtype", self._dtype)
        for core in ("numpy.core", "numpy._core"):
            self._function(f"{core}.multiarray", "_reconstruct", self._unfilled_array)
            self._function(f"{core}.multiarray", "scalar", self._scalar)
            self._function(f"{core}.numeric", "_frombuffer", self._array_of_buffer)

    def _dtype(self, code: Any, align: Any = False, copy: Any = False) -> np.dtype:
        if not isinstance(code, str) or not _NUMPY_DTYPE.fullmatch(code):
            raise CheckpointFormatError(f"numpy data of type {shown(code)}: refused")
        dtype = np.dtype(code, False, True)
        self._unfilled[id(dtype)] = dtype
        return dtype

    def _unfilled_array(self, kind: Any, shape: Any, code: Any) -> np.ndarray:
        if kind is not self.table["numpy", "ndarray"]:
            raise CheckpointFormatError("an array of a class of its own")
        array = np.empty(0, np.int8)
        self._unfilled[id(array)] = array
        return array

    def _array_of_buffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """How pickle protocol 5 writes arrays."""
        self._budget.spend(_check_array(shape, dtype, data))
        if order not in ("C", "F"):
            raise CheckpointFormatError(f"an array in order {shown(order)}")
        return np.frombuffer(bytes(data), dtype).reshape(shape, order=order)

    def _scalar(self, dtype: Any, data: Any) -> np.generic:
        self._budget.spend(_check_array((), dtype, _raw(data)))
        return np.frombuffer(_raw(data), np.dtype(dtype.str))[0]

    # --- PyTorch ---

    def _add_torch(self) -> None:
        for name, element in STORAGES.items():
            for module in ("torch", "torch.cuda", "torch.storage"):
                self.table[module, name] = StorageType(f"{module}.{name}", ELEMENTS[element])
        for word in ELEMENTS:
            self.table["torch", word] = f"torch.{word}"
        self._function("torch.serialization", "_get_layout", _device)
        self._function("torch", "Size", self._container(tuple))
        self._function("torch", "device", _device)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            self._function("torch._utils", name, _tensor)
        self._function("torch._utils", "_rebuild_tensor_v3", _tensor_of_bytes)
        self._function("torch._utils", "_rebuild_parameter", _parameter)
        self._function("torch._utils", "_rebuild_parameter_with_state", _parameter)
        self._function("torch._tensor", "_rebuild_from_type_v2", _tensor_of_type)
        for module, name in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
            self._function(module, name, _refused("a tensor that PyTorch does not write so"))
        for (module, name), what in _REFUSED.items():
            self._function(module, name, _refused(f"{what} ({module}.{name})"))


# --- builders -------------------------------------------------------------------------------------------------------


def _refused(what: str) -> Callable[..., Any]:
    def build(*_: Any) -> Any:
        raise CheckpointFormatError(f"the file holds {what}: refused")

    return build


def _is_attribute(name: Any) -> bool:
    return type(name) is str and not name.startswith("__") and not hasattr(argparse.Namespace, name)


def _complex(real: float, imaginary: float) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise CheckpointFormatError("a complex number whose parts are none")
    return complex(real, imaginary)


def _reconstructed(kind: Any, base: Any, state: Any) -> Any:
    """How pickle protocols 0 and 1 write an object."""
    if not isinstance(kind, Global) or kind.name != "argparse.Namespace" or state is not None:
        raise CheckpointFormatError("an object that is no argparse.Namespace: refused")
    return kind.build()


def _raw(data: Any) -> bytes:
    return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data


def _check_array(shape: Any, dtype: Any, data: Any) -> int:
    """Bytes of an array whose description fits."""
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, bytearray)):
        raise CheckpointFormatError("a numpy array of objects, or of no type: refused")
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointFormatError(f"a numpy array of shape {shown(shape)}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise CheckpointFormatError(f"a numpy array of shape {shape} and type {dtype} in {len(data)} bytes")
    return len(data)


def _fill_array(array: np.ndarray, state: Any) -> int:
    if type(state) is not tuple or len(state) != 5:
        raise CheckpointFormatError("a numpy array whose content makes no sense")
    _, shape, dtype, fortran, data = state
    size = _check_array(shape, dtype, _raw(data))
    array.__setstate__((1, shape, np.dtype(dtype.str), bool(fortran), bytes(_raw(data))))
    return size


def _set_byte_order(dtype: np.dtype, state: Any) -> int:
    order = _raw(state[1]) if type(state) is tuple and len(state) in (8, 9) else b""
    sizes_agree = order and state[5] in (-1, dtype.itemsize) and state[6] in (-1, dtype.alignment)
    if order not in (b"<", b">", b"|", b"=") or any(part is not None for part in state[2:5]) or not sizes_agree:
        raise CheckpointFormatError(f"a numpy type whose description makes no sense: {shown(state)}")
    dtype.__setstate__((3, order.decode(), None, None, None, dtype.itemsize, dtype.alignment, 0))
    return 0


def _device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str or len(kind) > _MAX_DEVICE_NAME or not (index is None or type(index) is int):
        raise CheckpointFormatError(f"a torch.device named {shown(kind)}")
    return kind if index is None else f"{kind}:{index}"


def _element(name: Any) -> Element:
    if not isinstance(name, str) or name[len("torch.") :] not in ELEMENTS:
        raise CheckpointFormatError(f"a tensor of type {shown(name)}, which numpy does not have: refused")
    return ELEMENTS[name[len("torch.") :]]


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = False, hooks: Any = None, metadata: Any = None
) -> np.ndarray:
    _check_metadata(metadata)
    return storage.tensor(offset, shape, strides)


def _tensor_of_bytes(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> np.ndarray:
    _check_metadata(metadata)
    return storage.tensor(offset, shape, strides, _element(dtype))


def _check_metadata(metadata: Any) -> None:
    for name in ("conj", "neg"):
        if isinstance(metadata, dict) and metadata.get(name):
            raise CheckpointFormatError(f"a tensor whose numbers have yet to be changed: save tensor.resolve_{name}()")


def _parameter(data: Any, *_: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise CheckpointFormatError("a torch Parameter that is no tensor")
    return data


def _tensor_of_type(rebuild: Any, kind: Any, arguments: Any, state: Any) -> np.ndarray:
    """A tensor with attributes, which are left out."""
    if getattr(kind, "name", None) not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise CheckpointFormatError("a tensor of a class of its own: refused")
    if not isinstance(rebuild, Global) or not rebuild.name.startswith("torch._utils._rebuild_"):
        raise CheckpointFormatError("a tensor that PyTorch does not write so: refused")
    return rebuild.build(*arguments)
