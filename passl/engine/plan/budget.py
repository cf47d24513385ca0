"""Time and memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(sec|min|s|m|h|d)", re.IGNORECASE)
GB = 2**30  # as the "max mem" of the log
_LONGEST = 10 * 365 * 86400


class PlanError(ValueError):
    """No plan can be made; the message says what would help."""


def parse_time(text: str) -> float:
    """Seconds of "12h", "90s", "1h30m", "2d", "1.5 h".

    Raises:
        PlanError: no such text, or nothing at all.
    """
    plain = text.strip()
    parts = _PART.findall(plain)
    if not parts or _PART.sub("", plain).strip():
        raise PlanError(f"time {text!r}: write a number with a unit: 90s, 45m, 12h, 1h30m, 2d")
    seconds = sum(float(number) * _UNITS[unit.lower()] for number, unit in parts)
    if not 0 < seconds <= _LONGEST:
        raise PlanError(f"time {text!r} must be more than nothing, and at most ten years")
    return seconds


def shown_time(seconds: float) -> str:
    """The two largest units: "1 d 3 h", "2 h 5 min", "45 s", "0.3 s"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            amount, rest = divmod(round(whole / lower_size) * lower_size, size)
            return f"{amount} {unit} {rest // lower_size} {lower}" if rest else f"{amount} {unit}"
    return f"{whole} s"


def time_option(seconds: float) -> str:
    """A value for --time that is not shorter."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 3 * size:
            return f"{-(-seconds // size):.0f}{unit}"
    return f"{-(-seconds // 1):.0f}s"


def shown_memory(size: float) -> str:
    return f"{size / GB:.2g} GB" if size < 10 * GB else f"{size / GB:.0f} GB"
