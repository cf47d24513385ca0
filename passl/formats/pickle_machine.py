"""An interpreter of pickles that can only build data.

Python's unpickler calls what a file names and sets attributes as a file wishes; restricting its ``find_class`` leaves
the second, and memory that a few bytes claim. This one knows a table of globals, calls nothing but their builders, and
counts. Opcodes are those of the standard library's ``pickletools``, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import mmap
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from passl.formats.limits import CheckpointFormatError, RefusedGlobalError

# A checkpoint of 1000 tensors takes 40 000, a list of the labels of ImageNet 1.3 million; an empty set has 216 bytes.
_MAX_OPERATIONS = 2_000_000
_MAX_INTEGER_BYTES = 1024
_MAX_LINE = 4096
_MAX_KEY_LENGTH = 64


class Global(NamedTuple):
    """What stands in for a global that a pickle names; ``build`` gets the arguments of a call of it."""

    name: str
    build: Callable[..., Any]


class PickleMachine:
    """Runs one pickle.

    Args:
        data: the bytes of the pickle, and of anything else.
        table: (module, name) -> :class:`Global`, or a plain value, for each global that may be named.
        build: called with an object and the state that the pickle sets on it (``BUILD``).
        persistent_load: called with a persistent id; None refuses them.
        start: where in ``data`` the pickle starts.
    """

    content = "a file of weights"  # for messages

    def __init__(
        self,
        data: Union[bytes, mmap.mmap],
        table: Mapping[tuple[str, str], Any],
        build: Callable[[Any, Any], None],
        persistent_load: Optional[Callable[[Any], Any]] = None,
        start: int = 0,
    ) -> None:
        self._data, self._end = data, len(data)
        self._table, self.build_state, self._persistent_load = table, build, persistent_load
        self.position = start
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object in the pickle; ``position`` is then behind it.

        Raises:
            CheckpointFormatError: it is refused; also IndexError, KeyError, TypeError, ValueError and others of what
                breaks a rule of the format: the caller knows the file to blame.
        """
        for _ in range(_MAX_OPERATIONS):
            code = self._data[self.position : self.position + 1]
            self.position += 1
            if code == b".":
                value = self.pop()
                if self._stack or self._marked:
                    raise CheckpointFormatError("a pickle that leaves more than one object")
                return value
            operation = _OPERATIONS.get(code)
            if operation is None:
                problem = f"pickle operation {code!r} at byte {self.position - 1}" if code else "a truncated pickle"
                raise CheckpointFormatError(f"{problem}: refused")
            operation(self)
        raise CheckpointFormatError(f"a pickle of more than {_MAX_OPERATIONS} operations: refused")

    # --- reading ---

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size < 0 or size > self._end - self.position:
            raise CheckpointFormatError(f"truncated: a pickle that needs {size} bytes at byte {self.position}")
        self.position += size
        return self._data[self.position - size : self.position]

    def number(self, size: int, signed: bool = False) -> int:
        """The next ``size`` bytes as an integer."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def integer(self, size: int) -> int:
        """An integer of ``size`` bytes."""
        if size > _MAX_INTEGER_BYTES:
            raise CheckpointFormatError(f"an integer of {size} bytes (at most {_MAX_INTEGER_BYTES}): refused")
        return self.number(size, signed=True)

    def line(self, limit: Optional[int] = _MAX_LINE) -> bytes:
        """The bytes up to the next line feed, without it."""
        end = self._data.find(b"\n", self.position, self._end if limit is None else self.position + limit)
        if end < 0:
            raise CheckpointFormatError(f"a pickle whose line at byte {self.position} has no end")
        return self.take(end + 1 - self.position)[:-1]

    # --- stack and memo ---

    def push(self, value: Any) -> None:
        """Put ``value`` on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Take the last value off the stack."""
        return self._stack.pop()

    def top(self, kinds: tuple[type, ...]) -> Any:
        """The last value, which has to be of exactly one of ``kinds``."""
        if type(self._stack[-1]) not in kinds:
            raise CheckpointFormatError(f"a pickle that adds items to {_describe(self._stack[-1])}")
        return self._stack[-1]

    def mark(self) -> None:
        """Set a mark on the stack."""
        self._marked.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        """Take everything since the last mark, and the mark, off the stack."""
        items, self._stack = self._stack, self._marked.pop()
        return items

    def discard(self) -> None:
        """Take the last value, or a mark if that is the last, off the stack."""
        if self._stack:
            self.pop()
        else:
            self.since_mark()

    def remember(self, index: Optional[int] = None) -> None:
        """Note the last value in the memo."""
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def recall(self, index: int) -> None:
        """Put a noted value on the stack."""
        self.push(self._memo[index])

    # --- objects ---

    def find(self, module: Any, name: Any) -> None:
        """Put the stand-in of a global on the stack."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise CheckpointFormatError("a pickle that names a global by other than text")
        if (module, name) not in self._table:
            hint = ""
            if module.startswith("torch.nn.") or module.startswith(("timm.", "torchvision.", "__main__")):
                hint = ". It may hold a whole model: in PyTorch, save model.state_dict() instead"
            raise RefusedGlobalError(
                f"the file asks for {module}.{name}, which is no part of {self.content}: refused, and nothing in the "
                f"file was executed{hint}"
            )
        self.push(self._table[module, name])

    def call(self, arguments: Any) -> None:
        """Replace the last value, a global, by what its builder makes of ``arguments``."""
        target = self.pop()
        if not isinstance(target, Global) or type(arguments) is not tuple:
            raise CheckpointFormatError(f"a pickle that calls {_describe(target)}")
        self.push(target.build(*arguments))

    def call_with_keywords(self) -> None:
        """NEWOBJ_EX, which data needs only without keywords."""
        keywords, arguments = self.pop(), self.pop()
        if keywords != {}:
            raise CheckpointFormatError("a pickle that calls something with keywords")
        self.call(arguments)

    def build(self) -> None:
        """Set a state on the last value but one."""
        state = self.pop()
        self.build_state(self._stack[-1], state)

    def persistent(self) -> None:
        """Replace the last value by what it is the persistent id of."""
        if self._persistent_load is None:
            raise CheckpointFormatError("a pickle that refers to other data where there are none")
        self.push(self._persistent_load(self.pop()))

    def set_items(self, items: list[Any]) -> None:
        """Add keys and values, alternating, to the dict on top."""
        add_items(self.top((dict, OrderedDict)), zip(items[::2], items[1::2]))

    def add(self, items: list[Any]) -> None:
        """Add ``items`` to the set on top."""
        self.top((set,)).update(map(checked_key, items))


def add_items(target: dict, items: Any) -> None:
    """Put (key, value) pairs into ``target``."""
    for key, value in items:
        target[checked_key(key)] = value


def checked_key(key: Any) -> Hashable:
    """``key``, if it is one that cannot make a dict slow: hashing nested tuples takes time exponential in their depth,
    and many integers of the same hash time that is quadratic in their number.
    """
    if type(key) is tuple and len(key) <= _MAX_KEY_LENGTH and not any(type(item) is tuple for item in key):
        for item in key:
            checked_key(item)
        return key
    plain = (str, bytes, float, bool, type(None), np.bool_, np.integer, np.floating)
    if isinstance(key, plain) or (type(key) is int and abs(key) < 1 << 64):
        return key
    raise CheckpointFormatError(f"a pickle with {_describe(key)} as a key: refused")


def decoded(raw: bytes) -> Union[str, bytes]:
    """What Python 2 called a string: text if it is UTF-8, else bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _quoted(line: bytes) -> bytes:
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
        raise CheckpointFormatError("a pickle with a string without quotes")
    return codecs.escape_decode(line[1:-1])[0]


def _text_integer(line: bytes) -> Union[int, bool]:
    if line in (b"00", b"01"):
        return line == b"01"
    if len(line) > _MAX_INTEGER_BYTES:
        raise CheckpointFormatError(f"an integer of {len(line)} digits (at most {_MAX_INTEGER_BYTES}): refused")
    return int(line.rstrip(b"L"))


def _utf8(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _describe(value: Any) -> str:
    return value.name if isinstance(value, Global) else f"a {type(value).__name__}"


def _find_on_stack(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.find(module, name)


def _find_and_call(machine: PickleMachine) -> None:
    """INST of protocol 0: the arguments come before the global."""
    arguments = tuple(machine.since_mark())
    machine.find(_utf8(machine.line()), _utf8(machine.line()))
    machine.call(arguments)


def _call_since_mark(machine: PickleMachine) -> None:
    """OBJ of protocol 1."""
    target, *arguments = machine.since_mark()
    machine.push(target)
    machine.call(tuple(arguments))


def _set_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _last(machine: PickleMachine, count: int) -> tuple:
    return tuple(reversed([machine.pop() for _ in range(count)]))


def _append(machine: PickleMachine, items: list[Any]) -> None:
    machine.top((list,)).extend(items)


def _new_dict(items: list[Any]) -> dict:
    result: dict = {}
    add_items(result, zip(items[::2], items[1::2]))
    return result


_OPERATIONS: dict[bytes, Callable[[PickleMachine], Any]] = {
    # the protocol's number, and the size of a frame: each read checks the end by itself
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
    # constants and numbers
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(m.number(4, signed=True)),
    b"\x8a": lambda m: m.push(m.integer(m.number(1))),
    b"\x8b": lambda m: m.push(m.integer(m.number(4))),
    b"I": lambda m: m.push(_text_integer(m.line())),
    b"L": lambda m: m.push(_text_integer(m.line())),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    # text and bytes
    b"X": lambda m: m.push(_utf8(m.take(m.number(4)))),
    b"\x8c": lambda m: m.push(_utf8(m.take(m.number(1)))),
    b"\x8d": lambda m: m.push(_utf8(m.take(m.number(8)))),
    b"V": lambda m: m.push(m.line(None).decode("raw-unicode-escape")),
    b"T": lambda m: m.push(decoded(m.take(m.number(4)))),
    b"U": lambda m: m.push(decoded(m.take(m.number(1)))),
    b"S": lambda m: m.push(decoded(_quoted(m.line(None)))),
    b"B": lambda m: m.push(m.take(m.number(4))),
    b"C": lambda m: m.push(m.take(m.number(1))),
    b"\x8e": lambda m: m.push(m.take(m.number(8))),
    b"\x96": lambda m: m.push(bytearray(m.take(m.number(8)))),
    # containers
    b"(": lambda m: m.mark(),
    b"0": lambda m: m.discard(),
    b"1": lambda m: m.since_mark(),
    b"2": lambda m: m.push(m._stack[-1]),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(_last(m, 1)),
    b"\x86": lambda m: m.push(_last(m, 2)),
    b"\x87": lambda m: m.push(_last(m, 3)),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.since_mark()),
    b"a": lambda m: _append(m, [m.pop()]),
    b"e": lambda m: _append(m, m.since_mark()),
    b"}": lambda m: m.push({}),
    b"d": lambda m: m.push(_new_dict(m.since_mark())),
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.since_mark()),
    b"\x8f": lambda m: m.push(set()),
    b"\x90": lambda m: m.add(m.since_mark()),
    b"\x91": lambda m: m.push(frozenset(map(checked_key, m.since_mark()))),
    # the memo
    b"p": lambda m: m.remember(_text_integer(m.line())),
    b"q": lambda m: m.remember(m.number(1)),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(),
    b"g": lambda m: m.recall(_text_integer(m.line())),
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    # globals; a call never is one of Python's, see Global
    b"i": _find_and_call,
    b"o": _call_since_mark,
    b"c": lambda m: m.find(_utf8(m.line()), _utf8(m.line())),
    b"\x93": _find_on_stack,
    b"R": lambda m: m.call(m.pop()),
    b"\x81": lambda m: m.call(m.pop()),
    b"\x92": lambda m: m.call_with_keywords(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent(),
}
