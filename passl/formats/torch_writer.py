"""PyTorch's files without PyTorch: a zip archive as ``torch.save`` writes it since 1.6 (see torch_reader)."""

from __future__ import annotations

import argparse
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np

from passl.formats.atomic import replacing
from passl.formats.pickle_globals import STORAGES
from passl.formats.pickle_writer import Keys, PickleWriter, where
from passl.formats.storage import checked_element, content, contiguous_strides

# The name that torch.save gives when it does not know the file's: equal values make equal files, whatever their names.
_ROOT = "archive"
_ALIGNMENT = 64
_ZIP64_SIZE = 1 << 31
_HEADER_SIZE, _ZIP64_FIELD_SIZE = 30, 20
_STORAGE_OF = {element: name for name, element in STORAGES.items() if name != "UntypedStorage"}


def save_torch(value: Any, path: Union[str, Path]) -> None:
    """Write what ``torch.load(path)`` reads; with ``weights_only=True`` too, unless it has an argparse.Namespace.

    Args:
        value: numbers, text, None, numpy arrays and dicts, OrderedDicts, lists, tuples and
            argparse.Namespaces of those. An array becomes a contiguous tensor on the CPU that needs no gradient; the
            same one used twice becomes two tensors that share their storage. A numpy scalar becomes a Python number,
            as ``weights_only=True`` refuses numpy's.

    Equal values give equal bytes. Arrays are written one after the other; the file replaces what is at ``path`` when
    it is whole.

    Raises:
        ValueError: a part of the value has no place in such a file; the text says which.
        OSError: the disk is full, or the folder missing or read-only.
    """
    stream = io.BytesIO()
    writer = _TorchPickle(stream.write)
    writer.save(value)
    pickled = pickle.PROTO + b"\x02" + stream.getvalue() + pickle.STOP
    with replacing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, "data.pkl", np.frombuffer(pickled, np.uint8))
        for name, text in ((".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")):
            _add(archive, file, name, np.frombuffer(text, np.uint8))
        for key, array in enumerate(writer.storages):
            _add(archive, file, f"data/{key}", content(array))
        _add(archive, file, "version", np.frombuffer(b"3\n", np.uint8))


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: np.ndarray) -> None:
    """Add an uncompressed member that starts at a multiple of 64 bytes, so that a reader can map it."""
    member = zipfile.ZipInfo(f"{_ROOT}/{name}")
    wide = data.size >= _ZIP64_SIZE
    start = file.tell() + _HEADER_SIZE + len(member.filename) + (_ZIP64_FIELD_SIZE if wide else 0) + 4
    padding = -start % _ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(member, "w", force_zip64=wide) as stream:
        stream.write(data)


class _TorchPickle(PickleWriter):
    """``storages`` are the arrays that the pickle refers to; the key of each is its index."""

    def __init__(self, write: Any) -> None:
        super().__init__(write)
        self.storages: list[np.ndarray] = []
        self._keys: dict[int, int] = {}

    def array(self, value: np.ndarray, path: Keys) -> None:
        element = checked_element(value, where(path), tuple(_STORAGE_OF))
        if id(value) not in self._keys:
            self._keys[id(value)] = len(self.storages)
            self.storages.append(value)
        shape = tuple(value.shape)
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.write(pickle.MARK + pickle.MARK)
        self.save("storage")
        self.name("torch", _STORAGE_OF[element.name])
        for item in (str(self._keys[id(value)]), "cpu", math.prod(shape)):
            self.save(item)
        self.write(pickle.TUPLE + pickle.BINPERSID)
        for item in (0, shape, contiguous_strides(shape), False):  # offset ... requires_grad
            self.save(item)
        self.empty_ordered_dict()  # hooks
        self.write(pickle.TUPLE + pickle.REDUCE)

    def other(self, value: Any, path: Keys) -> None:
        if type(value) is not argparse.Namespace:
            super().other(value, path)
        self.name("argparse", "Namespace")
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(vars(value), path)
        self.write(pickle.BUILD)
