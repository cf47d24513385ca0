"""Colours and markers of classes."""

from __future__ import annotations

# Petroff 2021, "Accessible color sequences for data visualization": told apart with any colour vision, also in grey.
TEN = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
# Nobody tells twenty colours apart for certain: the second ten differ in their marker too.
TWENTY = (
    *TEN,
    "#1b4f8a", "#8fce00", "#ff8fab", "#006d5b", "#d16ce0", "#5a2d0c", "#f2d024", "#0fb5ae", "#2b2d42", "#7a0045",
)  # fmt: skip
MARKERS = ("circle", "square", "triangle", "diamond", "cross")
DISTINCT = 100  # so many classes have a colour and marker of their own
NO_CLASS = "#8a8f98"


def colour_of(label: int) -> str:
    """The colour of a class; of -1, no class, grey."""
    return NO_CLASS if label < 0 else TWENTY[label % len(TWENTY)]


def marker_of(label: int) -> str:
    """Changes with every tenth class, so that classes of one colour differ in it."""
    return MARKERS[0] if label < 0 else MARKERS[label // len(TEN) % len(MARKERS)]
