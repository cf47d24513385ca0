"""Writing files as torch.save does, and such as it never would, without PyTorch."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional

import numpy as np


class Named(NamedTuple):
    """A global, by its name: it need not exist."""

    module: str
    name: str


class Call(NamedTuple):
    """A call of a global, as a pickle notes it."""

    function: Named
    arguments: tuple


class Raw(NamedTuple):
    """Pickle operations that leave one object."""

    operations: bytes


class Storage(NamedTuple):
    """A reference to a storage; `data` are its bytes (None: the file does not have it)."""

    kind: str
    key: str
    numel: int
    data: Optional[bytes]
    location: str = "cpu"


class _Pickler(pickle._Pickler):
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, stream: io.BytesIO, protocol: int, storages: dict[str, Storage], legacy: bool):
        super().__init__(stream, protocol)
        self._storages, self._legacy = storages, legacy

    def persistent_id(self, value: Any) -> Optional[tuple]:
        if not isinstance(value, Storage):
            return None
        self._storages[value.key] = value
        pid = ("storage", Named("torch", value.kind), value.key, value.location, value.numel)
        return (*pid, None) if self._legacy else pid

    def save_named(self, value: Named) -> None:
        self.write(f"c{value.module}\n{value.name}\n".encode())

    def save_call(self, value: Call) -> None:
        self.save(value.function)
        self.save(value.arguments)
        self.write(pickle.REDUCE)

    def save_raw(self, value: Raw) -> None:
        self.write(value.operations)

    dispatch[Named], dispatch[Call], dispatch[Raw] = save_named, save_call, save_raw


def pickled(value: Any, protocol: int = 2, storages: Optional[dict] = None, legacy: bool = False) -> bytes:
    """The pickle of `value`; storages that it refers to are noted in `storages`."""
    stream = io.BytesIO()
    _Pickler(stream, protocol, {} if storages is None else storages, legacy).dump(value)
    return stream.getvalue()


def write_zip(path: Path, value: Any, protocol: int = 2, extra: Optional[dict[str, bytes]] = None, **options) -> Path:
    """The format of PyTorch 1.6 and later; `extra`: more members, `options`: of zipfile."""
    storages: dict[str, Storage] = {}
    members = {"data.pkl": pickled(value, protocol, storages), "byteorder": b"little"}
    members.update({f"data/{key}": storage.data for key, storage in storages.items() if storage.data is not None})
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in {**members, **(extra or {})}.items():
            entry = zipfile.ZipInfo(f"archive/{name}")
            start = archive.fp.tell() + 30 + len(entry.filename) + 4
            padding = -start % 64  # PyTorch's alignment of numbers
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            entry.compress_type = archive.compression
            archive.writestr(entry, content)
    return path


def write_legacy(path: Path, value: Any, protocol: int = 2, little_endian: bool = True) -> Path:
    """The format before PyTorch 1.6."""
    storages: dict[str, Storage] = {}
    body = pickled(value, protocol, storages, legacy=True)
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}
    parts = [pickled(0x1950A86A20F9469CFC6C, protocol), pickled(1001, protocol), pickled(system, protocol), body]
    parts.append(pickled(list(storages), protocol))
    parts += [struct.pack("<q", storage.numel) + (storage.data or b"") for storage in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def tensor(array: np.ndarray, kind: str = "FloatStorage", key: str = "0") -> Call:
    """A dense tensor that owns its storage."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return view(Storage(kind, key, array.size, array.tobytes()), 0, array.shape, strides)


def view(storage: Any, offset: Any, shape: Any, strides: Any) -> Call:
    """A tensor."""
    return Call(Named("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, {}))
