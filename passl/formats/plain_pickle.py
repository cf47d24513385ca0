"""Pickles of plain data: lists, dicts, texts, numbers and numpy arrays, as ground-truth files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

from passl.formats.limits import Budget, blaming
from passl.formats.pickle_globals import Globals
from passl.formats.pickle_machine import PickleMachine
from passl.formats.storage import MappedFile
from passl.formats.tree import check_tree


class _PlainMachine(PickleMachine):
    content = "a file of plain data"


def load_pickle(path: Union[str, Path]) -> Any:
    """The object in a pickle of any protocol, also one of Python 2. Nothing in the file is executed.

    Raises:
        CheckpointFormatError: the file is missing, damaged, hostile, or holds more than plain data (the text gives its
            full name).
    """
    path = Path(path)
    with blaming(path, "a pickle of plain data"), MappedFile(path) as file:
        globals_ = Globals(Budget(file.size))
        value = _PlainMachine(file.map, globals_.table, globals_.build).run()
        globals_.finish()
        check_tree(value)
        return value
