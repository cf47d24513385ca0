"""The names in a tarball's index, `file_indices.npy`: a pickled dict {file index: name} inside a numpy array.

Python would take 200 bytes for each name, in each worker; here they are two arrays, whose memory forks share. A file
is read by an interpreter of pickles that can only build data, and written without a dict.
"""

from __future__ import annotations

import io
import mmap
import pickle
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np

from passl.formats.limits import Budget, CheckpointFormatError, blaming
from passl.formats.pickle_machine import Global, PickleMachine

_BATCH = 1000  # items between two marks, as Python's pickler has them
# Names of numpy 1: every numpy since then reads them.
_CORE = "numpy.core.multiarray"


class Names:
    """Names by their number.

    Args:
        text: all names, one behind the other, in UTF-8.
        ends: [N] where each ends in `text`.
        numbers: [N] the number of each; None: 0 .. N - 1.
    """

    def __init__(self, text: bytes, ends: np.ndarray, numbers: Optional[np.ndarray] = None) -> None:
        self._text, self._ends, self.numbers = text, ends, numbers
        if numbers is not None:
            self._order = np.argsort(numbers, kind="stable")

    def __len__(self) -> int:
        return len(self._ends)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Names)
            and self._text == other._text
            and np.array_equal(self._ends, other._ends)
            and np.array_equal(self.all_numbers(), other.all_numbers())
        )

    __hash__ = None

    def all_numbers(self) -> np.ndarray:
        """[N] in the order of the names."""
        return np.arange(len(self)) if self.numbers is None else self.numbers

    def encoded(self, position: int) -> bytes:
        """The UTF-8 of the name at `position` in the order of the names."""
        return self._text[self._ends[position - 1] if position else 0 : self._ends[position]]

    def __getitem__(self, number: int) -> str:
        """Raises KeyError: there is no such number."""
        position = int(number)
        if self.numbers is not None:
            found = np.searchsorted(self.numbers, number, sorter=self._order)
            position = int(self._order[found]) if found < len(self) else -1
            if position < 0 or self.numbers[position] != number:
                raise KeyError(number)
        elif not 0 <= position < len(self):
            raise KeyError(number)
        return self.encoded(position).decode("utf-8", "surrogatepass")


class NamesBuilder:
    """Collects names; `add` in the order of the file."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends, self._numbers = array("Q"), array("Q")

    def add(self, number: int, encoded: bytes) -> None:
        self._text += encoded
        if number != len(self._ends) or self._numbers:
            if not self._numbers:
                self._numbers.extend(range(len(self._ends)))
            self._numbers.append(number)
        self._ends.append(len(self._text))

    def build(self) -> Names:
        numbers = np.array(self._numbers, np.uint64) if self._numbers else None
        return Names(bytes(self._text), np.array(self._ends, np.int64), numbers)


# --- writing --------------------------------------------------------------------------------------------------------


def write_names(file: BinaryIO, names: Names) -> None:
    """What `numpy.save(file, {number: name, ...})` writes."""
    _begin_array(file, ())
    file.write(pickle.EMPTY_DICT)
    numbers = names.all_numbers()
    for start in range(0, len(names), _BATCH):
        batch = io.BytesIO()
        for position in range(start, min(start + _BATCH, len(names))):
            _write_integer(batch, int(numbers[position]))
            _write_text(batch, names.encoded(position))
        file.write(pickle.MARK + batch.getvalue() + pickle.SETITEMS)
    _end_array(file)


def write_rows(file: BinaryIO, rows: Sequence[tuple[int, str]]) -> None:
    """What `numpy.save(file, rows)` writes, with `rows` an array [C, 2] of objects."""
    _begin_array(file, (len(rows), 2))
    for number, name in rows:
        _write_integer(file, number)
        _write_text(file, name.encode("utf-8", "surrogatepass"))
    _end_array(file)


def _begin_array(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
    write = file.write
    write(pickle.PROTO + b"\x03")
    write(pickle.GLOBAL + f"{_CORE}\n_reconstruct\n".encode() + pickle.GLOBAL + b"numpy\nndarray\n")
    write(pickle.BININT1 + b"\0" + pickle.TUPLE1 + pickle.SHORT_BINBYTES + b"\1b" + pickle.TUPLE3 + pickle.REDUCE)
    write(pickle.MARK + pickle.BININT1 + b"\1" + pickle.MARK)
    for size in shape:
        _write_integer(file, size)
    write(pickle.TUPLE + pickle.GLOBAL + b"numpy\ndtype\n")
    _write_text(file, b"O8")
    write(pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3 + pickle.REDUCE + pickle.MARK + pickle.BININT1 + b"\3")
    _write_text(file, b"|")
    write(pickle.NONE * 3 + (pickle.BININT + b"\xff\xff\xff\xff") * 2 + pickle.BININT1 + b"\x3f" + pickle.TUPLE)
    write(pickle.BUILD + pickle.NEWFALSE + pickle.MARK)


def _end_array(file: BinaryIO) -> None:
    file.write(pickle.LIST + pickle.TUPLE + pickle.BUILD + pickle.STOP)


def _write_integer(file: BinaryIO, value: int) -> None:
    for code, size in ((pickle.BININT1, 1), (pickle.BININT2, 2), (pickle.LONG1 + b"\x09", 9)):
        if value < 1 << (8 * size):
            file.write(code + value.to_bytes(size, "little"))
            return


def _write_text(file: BinaryIO, encoded: bytes) -> None:
    file.write(pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded)


# --- reading --------------------------------------------------------------------------------------------------------


def read_names(path: Path) -> Names:
    """The names in the file of indices at `path`; nothing in it is executed.

    Raises:
        CheckpointFormatError: it is damaged, or holds anything but a dict of numbers and names; RefusedGlobalError if
            it asks for something to be called, which the text names.
        OSError: it cannot be read.
    """
    content, names = _read(path)
    if content != [{}]:
        raise CheckpointFormatError(f"{path} holds no dict of numbers and names")
    return names


def read_rows(path: Path) -> list[tuple[int, str]]:
    """The rows (label, class name) in the file `class-ids.npy` at `path`. Raises as `read_names`."""
    content, names = _read(path)
    labels, class_names = content[::2], content[1::2]
    plain = all(type(label) is int for label in labels) and all(type(name) in (str, int) for name in class_names)
    if len(names) or len(labels) != len(class_names) or not plain:
        raise CheckpointFormatError(f"{path} holds no rows of a label (a whole number) and a class name")
    return [(label, str(name)) for label, name in zip(labels, class_names)]


def _read(path: Path) -> tuple[list[Any], Names]:
    """The objects in an array, in the order of its rows, and the names that were in its dict."""
    with blaming(path, "an array that numpy wrote"), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)  # objects are written in C order in any case
        if dtype != np.dtype(object):
            raise CheckpointFormatError(f"an array of {dtype}, not of objects")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            machine = _IndexMachine(data, file.tell())
            return machine.array(shape), machine.names.build()


class _Array:
    """An array that a pickle announces."""

    content: Optional[list[Any]] = None


class _Dtype:
    """The dtype of one."""


class _IndexMachine(PickleMachine):
    """Builds nothing but one array of plain objects; the items of its dict go into `names`.

    The dict, which is most of the file, is read in a loop of its own: four times as fast, and without an object for
    each item.
    """

    content = "an index of a tarball"

    def __init__(self, data: mmap.mmap, start: int) -> None:
        table = {("numpy", "ndarray"): Global("numpy.ndarray", self._refuse), ("numpy", "dtype"): Global("", _dtype)}
        for core in ("numpy.core", "numpy._core"):
            table[f"{core}.multiarray", "_reconstruct"] = Global("numpy.array", lambda *_: _Array())
        table["_codecs", "encode"] = Global("_codecs.encode", lambda text, encoding: text.encode("latin1"))
        super().__init__(data, table, self._set_state, start=start)
        self.names = NamesBuilder()
        # A few bytes can repeat a long name a million times.
        self._budget = Budget(len(data))
        # Where the names are that the memo has, from the first one's number on.
        self._first_text, self._texts = 0, array("Q")

    def array(self, shape: tuple[int, ...]) -> list[Any]:
        """The objects in the array, in its order."""
        value = self.run()
        if not isinstance(value, _Array) or value.content is None or len(value.content) != np.prod(shape, dtype=int):
            raise CheckpointFormatError(f"no array of shape {shape}")
        return value.content

    def mark(self) -> None:
        if self._stack and type(self._stack[-1]) is dict:
            self._read_items()
        else:
            super().mark()

    def set_items(self, items: list[Any]) -> None:
        self.top((dict,))
        number, name = items
        if type(number) is not int or not 0 <= number < 1 << 64 or type(name) is not str:
            raise CheckpointFormatError("a dict that is not of numbers and names")
        self._add(number, name.encode("utf-8", "surrogatepass"))

    def _add(self, number: int, encoded: bytes) -> None:
        self._budget.spend(len(encoded))
        self.names.add(number, encoded)

    def remember(self, index: Optional[int] = None) -> None:
        if self._texts and (self._first_text <= (index or 0) < self._first_text + len(self._texts)):
            raise CheckpointFormatError("a pickle that notes two values under one number")
        super().remember(len(self._memo) + len(self._texts) if index is None else index)

    def _refuse(self, *_: Any) -> None:
        raise CheckpointFormatError("an array that numpy does not write so")

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, _Array) and target.content is None:
            content = state[4]
            if type(content) is not list or not isinstance(state[2], _Dtype):
                raise CheckpointFormatError("an array that is not of objects")
            target.content = content
        elif not isinstance(target, _Dtype):
            raise CheckpointFormatError(f"a pickle that changes a {type(target).__name__}")

    def recall(self, index: int) -> None:
        if index in self._memo:
            super().recall(index)
        else:
            start, end = self._text(self._texts[index - self._first_text])
            self.push(self._data[start:end].decode("utf-8", "surrogatepass"))

    def _read_items(self) -> None:
        """Numbers and names up to the end of a batch."""
        data, add, texts = self._data, self.names.add, self._texts
        position = self.position
        if not texts:
            self._first_text = len(self._memo)
        while data[position] != 0x75:  # SETITEMS
            # FRAME, which may come before any object
            number, position = self._number(position + 9 if data[position] == 0x95 else position)
            position += 9 if data[position] == 0x95 else 0
            code = data[position]
            if code in (0x68, 0x6A):  # BINGET, LONG_BINGET: a name that occurred before
                end = position + (2 if code == 0x68 else 5)
                index = int.from_bytes(data[position + 1 : end], "little")
                start, stop = self._text(texts[index - self._first_text] if index >= self._first_text else position)
                self._add(number, data[start:stop])
                position = end
                continue
            start, end = self._text(position)
            encoded = data[start:end]
            encoded.decode("utf-8", "surrogatepass")  # damage is told now, not in the middle of a run
            add(number, encoded)
            code = data[end]
            if code in (0x94, 0x71, 0x72):  # MEMOIZE, BINPUT, LONG_BINPUT
                texts.append(position)
                end += {0x94: 1, 0x71: 2, 0x72: 5}[code]
            position = end
        self.position = position + 1

    def _number(self, position: int) -> tuple[int, int]:
        """The number at a position, and where it ends."""
        data, code = self._data, self._data[position]
        if code == 0x4D:  # BININT2
            return data[position + 1] | data[position + 2] << 8, position + 3
        if code == 0x4B:  # BININT1
            return data[position + 1], position + 2
        if code == 0x4A:  # BININT
            return int.from_bytes(data[position + 1 : position + 5], "little"), position + 5
        if code == 0x8A and data[position + 1] <= 9:  # LONG1
            end = position + 2 + data[position + 1]
            return int.from_bytes(data[position + 2 : end], "little"), end
        raise CheckpointFormatError(f"a dict whose item at byte {position} is not a number and a name: refused")

    def _text(self, position: int) -> tuple[int, int]:
        """Where the bytes of the text at a position start and end."""
        data, code = self._data, self._data[position]
        size = {0x8C: 1, 0x58: 4, 0x8D: 8}.get(code)  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
        if size is None:
            raise CheckpointFormatError(f"a dict whose item at byte {position} is not a number and a name: refused")
        start = position + 1 + size
        end = start + int.from_bytes(data[position + 1 : start], "little")
        if end >= len(data):
            raise CheckpointFormatError(f"truncated: a name at byte {position} goes on")
        return start, end


def _dtype(code: Any, *_: Any) -> _Dtype:
    if code not in ("O8", "O4", "O", "|O"):
        raise CheckpointFormatError(f"an array of {code!r}, not of objects")
    return _Dtype()
