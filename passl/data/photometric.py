"""Which changes of colour and light have a meaning for images that are not 8-bit RGB, and saying so once.

Hue, saturation, grey and solarisation are about three colours and a fixed white. Brightness and contrast are kept for
one channel; several ones are measurements, whose ratios a common factor or mean would falsify.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger("passl")

_COLOR = ("hue", "saturation", "gray_prob", "global_solarize_probs")
_LIGHT = ("brightness", "contrast")
# By the transform's name: arguments that switch an operation off where they are 0.
_OPERATIONS = {
    "MultiCrop": (*_COLOR, *_LIGHT),
    "ColorJitter": ("hue", "saturation", *_LIGHT),
    "RandomGrayscale": ("prob",),
    "Solarize": ("prob",),
}
_said: set[str] = set()  # transforms; a worker process inherits it


def without_meaning(transform: str, channels: int) -> list[str]:
    """Arguments of the registered ``transform`` whose operations arrays of so many channels do without."""
    kept = _LIGHT if channels == 1 else ()
    return [name for name in _OPERATIONS.get(transform, ()) if name not in kept]


def is_kept(operation: str, channels: int) -> bool:
    """Whether a step of the colour jitter is done to an array."""
    return operation in _LIGHT and channels == 1


def say_off(transform: str, channels: int, values: Mapping[str, Any], chosen: Iterable[str] = ()) -> None:
    """Log which operations of ``transform`` are off, once in this process.

    Args:
        values: the transform's arguments; an operation with 0 was off anyway.
        chosen: those of the arguments that the user wrote down.
    """
    if transform in _said:
        return
    off = [name for name in without_meaning(transform, channels) if _is_on(values.get(name))]
    if not off:
        return
    _said.add(transform)
    written = [f"{name}: {values[name]}" for name in off if name in set(chosen)]
    also = f" (also what the configuration says: {', '.join(written)})" if written else ""
    logger.warning(
        "%s: %s off%s: no meaning for images that are not 8-bit RGB, here of %d channel%s",
        transform,
        f"{', '.join(off)} {'are' if len(off) > 1 else 'is'}",
        also,
        channels,
        "s" * (channels != 1),
    )


def _is_on(value: Any) -> bool:
    return any(value) if isinstance(value, (list, tuple)) else bool(value)
