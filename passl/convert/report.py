"""What became of every tensor of a file, and of every tensor of the architecture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from passl.formats.limits import CheckpointFormatError

_INDENT: dict[str, Any] = {
    "initial_indent": "  ",
    "subsequent_indent": "  ",
    "break_long_words": False,
    "break_on_hyphens": False,
}


class ConversionError(CheckpointFormatError):
    """A file that can be read, but does not become weights of a known architecture."""


@dataclass
class Report:
    """Names of the file, but for ``missing``, which are the architecture's.

    ``renamed`` and ``transposed`` are parts of ``matched``: (name there, name here), and names.
    """

    matched: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)  # of batch norms, kept for the way back
    not_asked: list[str] = field(default_factory=list)  # other parts of the file
    allowed: list[str] = field(default_factory=list)  # left over, and allowed by name
    left_over: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def allow(self, patterns: Sequence[str]) -> None:
        """Take what one of ``patterns`` (as in a shell) names out of the left-over."""
        allowed = [key for key in self.left_over if any(fnmatchcase(key, pattern) for pattern in patterns)]
        self.allowed += allowed
        self.left_over = [key for key in self.left_over if key not in allowed]

    def check(self, what: str) -> None:
        """Raises:
        ConversionError: nothing matched, something of the file is left over, or of the architecture missing.
        """
        if not self.matched and not self.misshapen:
            there = _few([*self.left_over, *self.not_asked])
            raise ConversionError(f"no tensor of the file belongs to {what}; it holds {there}")
        problems = []
        if self.misshapen:
            problems.append(f"{len(self.misshapen)} of another shape than in {what}: {_few(self.misshapen)}")
        if self.missing:
            problems.append(f"{len(self.missing)} missing for {what}: {_few(self.missing)}")
        if self.left_over:
            keys = [key.split(".") for key in self.left_over]
            shared = ".".join(keys[0][: min(_shared(keys[0], key) for key in keys)])
            pattern = f"{shared}.*" if shared and len(keys) > 1 else self.left_over[0]
            problems.append(
                f"{len(self.left_over)} left over that {what} has no place for: {_few(self.left_over)} (--allow "
                f"'{pattern}' leaves such out, --kind backbone asks for a backbone alone)"
            )
        if problems:
            raise ConversionError(f"{len(self.matched)} tensors matched, but " + "; ".join(problems))

    def lines(self, verbose: bool = False) -> list[str]:
        """For people: counts, and below each the names, those of all blocks in one (``verbose``: also the matched)."""
        lines = [f"{len(self.matched)} matched"]
        lines += _named("matched", self.matched)[1:] if verbose else []
        for title, names in (
            ("renamed", [_renaming(there, here) for there, here in self.renamed]),
            ("transposed", self.transposed),
            ("counters of batch norms, kept for the way back", self.counters),
            ("in other parts of the file, not asked for", self.not_asked),
            ("left out, as allowed", self.allowed),
            ("left over", self.left_over),
        ):
            lines += _named(title, names)
        return lines if self.left_over else [*lines, "0 left over"]


def _named(title: str, names: Sequence[str]) -> list[str]:
    return [f"{len(names)} {title}", *textwrap.wrap(", ".join(grouped(names)), 110, **_INDENT)] if names else []


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in the number of their block only, as one: ``blocks.*.norm1.bias (12)``."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\b(\w*blocks|layer[1-4])\.\d+\b", r"\1.*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [pattern if count == 1 else f"{pattern} ({count})" for pattern, count in counts.items()]


def _renaming(there: str, here: str) -> str:
    """What changes in a name, without the parts at both ends that stay: ``student.module.* -> student.*``."""
    old, new = there.split("."), here.split(".")
    tail = _shared(old[::-1], new[::-1])
    head = min(_shared(old, new), len(old) - tail, len(new) - tail)
    middle = [".".join(parts[head : len(parts) - tail]) for parts in (old, new)]
    first, last = ["*"] * (head > 0), ["*"] * (tail > 0)
    return " -> ".join(".".join(filter(None, [*first, part, *last])) for part in middle)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts both start with."""
    return next((index for index, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _few(names: Sequence[str], limit: int = 12) -> str:
    groups = grouped(names)
    more = f" ... and {len(groups) - limit} more" if len(groups) > limit else ""
    return ", ".join(groups[:limit]) + more
