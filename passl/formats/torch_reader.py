"""PyTorch's files without PyTorch: what ``torch.save`` wrote, as numpy arrays, with nothing in the file executed.

Both formats (torch/serialization.py) are a pickle that refers to storages by key. Since 1.6 it is a zip archive with
members ``{name}/data.pkl`` and ``{name}/data/{key}``; before, four pickles (magic number, version, system, object), a
pickled list of keys, and then for each key a 64-bit count and the numbers.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

import numpy as np

from passl.formats.limits import DAMAGE, Budget, CheckpointFormatError, RefusedGlobalError, blaming, shown
from passl.formats.pickle_globals import Globals, StorageType
from passl.formats.pickle_machine import PickleMachine
from passl.formats.safetensors import load_safetensors
from passl.formats.storage import Element, MappedFile, Storage, widens
from passl.formats.tree import check_tree
from passl.formats.zip_members import Member, check_member, zip_members

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
Load = Callable[[Any], Any]


def load_torch(path: Union[str, Path], bfloat16: Literal["float32", "bits"] = "float32") -> Any:
    """The object in a ``.pth``, ``.pt`` or ``.pth.tar`` file of any PyTorch since 0.4, or in a ``.safetensors`` file.

    Nothing in the file is executed: only weights and plain data are built. Every tensor is a read-only, C-contiguous
    array, wherever it was located; bfloat16, which numpy does not have, comes as float32 of the same values, or with
    ``bfloat16="bits"`` as it is, in arrays of type ``BFLOAT16`` that the writers here write as bfloat16. Where the
    numbers lie in the file as the array has them, the array is a view of the mapped file: it takes no memory of its
    own, and the file must not be written to while it lives (replacing or deleting it is harmless). A Parameter is its
    array, a torch.Size a tuple, a device or dtype its text; attributes of an OrderedDict (``_metadata``) are left out.

    The zip format has checksums, and all are compared. The older one has none: damage to its numbers is not noticed,
    nor is a name or a size that was changed into another possible one.

    Raises:
        CheckpointFormatError: the file is missing, damaged, hostile, no file of PyTorch, or holds anything else (the
            text gives its full name).
    """
    path, widen = Path(path), widens(bfloat16)
    if path.suffix == ".safetensors":
        return load_safetensors(path, bfloat16)
    with blaming(path, "a file of PyTorch"), MappedFile(path) as file:
        value = (_read_zip if file.map[:4] == b"PK\x03\x04" else _read_legacy)(file, widen)
        check_tree(value)
        return value


class _Reference(NamedTuple):
    """What a pickle says of a storage: its element type, key and length, and the part of it that is meant."""

    element: Element
    key: str
    numel: int
    part: Optional[tuple]


def _reference(persistent_id: Any) -> _Reference:
    if type(persistent_id) is tuple and persistent_id[:1] == ("module",):
        raise CheckpointFormatError(
            "the file holds a whole model, not only weights: in PyTorch, save model.state_dict() instead"
        )
    if type(persistent_id) is not tuple or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        raise CheckpointFormatError(f"a reference to {shown(persistent_id)}, which is no storage")
    _, kind, key, _, numel = persistent_id[:5]
    if type(kind) is not StorageType or type(key) is not str or type(numel) is not int or numel < 0:
        raise CheckpointFormatError(f"a storage whose description makes no sense: {shown(persistent_id)}")
    part = persistent_id[5] if len(persistent_id) == 6 else None
    if part is not None and (type(part) is not tuple or len(part) != 3):
        raise CheckpointFormatError(f"a part of a storage that makes no sense: {shown(part)}")
    return _Reference(kind.element, key, numel, part)


def _run(file: MappedFile, data: Union[bytes, mmap.mmap], load: Optional[Load], start: int = 0) -> tuple[Any, int]:
    """The object of the pickle at ``start`` of ``data``, and where it ends."""
    globals_ = Globals(Budget(file.size))
    machine = PickleMachine(data, globals_.table, globals_.build, load, start)
    value = machine.run()
    globals_.finish()
    return value, machine.position


# --- zip ------------------------------------------------------------------------------------------------------------


def _read_zip(file: MappedFile, widen: bool) -> Any:
    members = zip_members(file)
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if any("/code/" in name or name.endswith("/constants.pkl") for name in members):
        raise CheckpointFormatError(
            "a TorchScript program, not weights: in PyTorch, save torch.jit.load(path).state_dict() with torch.save"
        )
    if len(roots) != 1:
        raise CheckpointFormatError(
            f"a zip archive, but not of torch.save: it must have one folder with data.pkl, and has {len(roots)}"
        )
    order = members.get(f"{roots[0]}byteorder")
    if order and _content(file, order) != b"little":
        raise CheckpointFormatError(f"numbers in byte order {shown(_content(file, order))}: only little-endian is read")
    pickled = _content(file, members[f"{roots[0]}data.pkl"])
    return _run(file, pickled, _ZipStorages(file, members, roots[0], widen).load)[0]


def _content(file: MappedFile, member: Member) -> bytes:
    check_member(file, member)
    return file.map[member.start : member.start + member.size]


class _ZipStorages:
    """The storages of an archive, each checked when the pickle first refers to it."""

    def __init__(self, file: MappedFile, members: Mapping[str, Member], root: str, widen: bool) -> None:
        self._file, self._members, self._root, self._widen = file, members, root, widen
        self._budget = Budget(file.size)
        self._storages: dict[tuple[str, str], Storage] = {}
        self._checked: set[str] = set()

    def load(self, persistent_id: Any) -> Storage:
        """The storage that a persistent id means."""
        wanted = _reference(persistent_id)
        storage = self._storages.get((wanted.key, wanted.element.name)) or self._open(wanted)
        self._storages[wanted.key, wanted.element.name] = storage
        if storage.numel != wanted.numel:
            raise CheckpointFormatError(f"storage {shown(wanted.key)} has {storage.numel} numbers, not {wanted.numel}")
        return storage

    def _open(self, wanted: _Reference) -> Storage:
        member = self._members.get(f"{self._root}data/{wanted.key}")
        if member is None:
            raise CheckpointFormatError(f"incomplete: storage {shown(wanted.key)} is missing in the archive")
        if wanted.key not in self._checked:
            check_member(self._file, member)
            self._checked.add(wanted.key)
        size = wanted.element.raw.itemsize
        if member.size != wanted.numel * size:
            raise CheckpointFormatError(
                f"storage {shown(wanted.key)} has {member.size} bytes, not {wanted.numel} numbers of {size} bytes"
            )
        buffer, start = self._file.bytes_at(member.start, member.size, size)
        return Storage(buffer, start, wanted.element, wanted.numel, self._budget, self._widen)


# --- before 1.6 ------------------------------------------------------------------------------------------------------


def _read_legacy(file: MappedFile, widen: bool) -> Any:
    position = _check_preamble(file)
    # The numbers stand behind the object, whose storages have to be known to find them: so it is built twice, first
    # with placeholders.
    measured = _MeasuredStorages()
    _, end = _run(file, file.map, measured.load, position)
    keys, end = _run(file, file.map, None, end)
    is_list = type(keys) is list and all(type(key) is str for key in keys)
    if not is_list or sorted(keys) != sorted(measured.storages):
        raise CheckpointFormatError("damaged: the list of storages is not that of the tensors")
    storages = {}
    budget = Budget(file.size)
    for key in keys:
        element, _, numel, _ = measured.storages[key]
        size = numel * element.raw.itemsize
        if int.from_bytes(file.map[end : end + 8], "little") != numel:
            raise CheckpointFormatError(f"truncated or damaged: storage {shown(key)} should have {numel} numbers")
        buffer, start = file.bytes_at(end + 8, size, element.raw.itemsize)
        storages[key] = Storage(buffer, start, element, numel, budget, widen)
        end += 8 + size

    def load(persistent_id: Any) -> Storage:
        wanted = _reference(persistent_id)
        return storages[wanted.key].part(*wanted.part[1:]) if wanted.part else storages[wanted.key]

    return _run(file, file.map, load, position)[0]


def _check_preamble(file: MappedFile) -> int:
    """Where the pickled object starts."""
    if file.map[257:262] == b"ustar":
        raise CheckpointFormatError("a tar archive (PyTorch before 0.2 wrote such): save it again with a newer PyTorch")
    is_pickle = file.map[:1] in (b"\x80", b"L")
    try:
        magic, position = _run(file, file.map, None)
    except RefusedGlobalError:
        raise
    except (*DAMAGE, CheckpointFormatError) as error:
        if is_pickle:
            raise
        raise CheckpointFormatError(f"not a file of PyTorch: it starts with {file.map[:16]!r}") from error
    if magic != _MAGIC_NUMBER:
        raise CheckpointFormatError("a pickle, but not of torch.save")
    version, position = _run(file, file.map, None, position)
    if version != _PROTOCOL_VERSION:
        raise CheckpointFormatError(f"format version {shown(version)}, known is {_PROTOCOL_VERSION}")
    system, position = _run(file, file.map, None, position)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CheckpointFormatError("numbers in another byte order than little-endian: save the file again on a PC")
    return position


class _MeasuredStorages:
    """Stands in for the storages, and notes what the pickle says of each."""

    def __init__(self) -> None:
        self.storages: dict[str, _Reference] = {}

    def load(self, persistent_id: Any) -> _UnreadStorage:
        """A placeholder for the storage that a persistent id means."""
        wanted = _reference(persistent_id)
        known = self.storages.setdefault(wanted.key, wanted)
        if known[:3] != wanted[:3]:
            raise CheckpointFormatError(f"storage {shown(wanted.key)} is described in two ways")
        return _UnreadStorage()


class _UnreadStorage:
    def tensor(self, *_: Any) -> np.ndarray:
        return np.empty(0, np.float32)
