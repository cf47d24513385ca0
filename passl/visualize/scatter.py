"""A map of images as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from passl.visualize.colours import DISTINCT, NO_CLASS, colour_of, marker_of

_WIDTH, _MARGIN, _TITLE, _LINE = 1200, 36, 44, 26
_LEGEND_ROWS, _NAME_LETTERS = 25, 24
_LEGEND_COLUMNS = 4
_OVER = 2  # drawn so much larger and shrunk: smooth edges
_INK, _PAPER, _FAINT = "#24292f", "#ffffff", "#d7dbe0"


def scatter_picture(
    points: np.ndarray,
    labels: Optional[Sequence[int]],
    class_names: Sequence[str],
    thumbnails: Optional[Sequence[Optional[Image.Image]]] = None,
    title: str = "",
) -> Image.Image:
    """Points [N, 2] as dots in the colours of their classes, with a legend; or, with thumbnails, as small images.

    Both axes have one scale. Thumbnails are thinned to one for each cell of a grid, the nearest to its middle; they
    have a frame in the colour of their class, and all the points lie behind them as faint dots.

    Args:
        labels: [N], numbers of ``class_names``, -1 for no class; None: there are no classes.
        thumbnails: [N], in any size, None for a point without one.

    Raises:
        ValueError: points are not finite, or lengths differ.
    """
    points, labels = checked(points, labels, class_names)
    if thumbnails is not None and len(thumbnails) != len(points):
        raise ValueError(f"there are {len(points)} points and {len(thumbnails)} thumbnails: one each, None for none")
    places, height = _placed(points)
    top = _TITLE if title else 0
    legend = _legend(labels, class_names)
    width = _WIDTH + (legend.width if legend else 0)
    picture = Image.new("RGB", (width, max(height + top, (legend.height if legend else 0) + top)), _PAPER)
    if thumbnails is not None and any(image is not None for image in thumbnails):
        picture.paste(_thumbnail_map(places, labels, thumbnails, (_WIDTH, height)), (0, top))
    else:
        picture.paste(_dot_map(places, labels, (_WIDTH, height)), (0, top))
    if title:
        ImageDraw.Draw(picture).text((_MARGIN, 14), _fitting(title, width - 2 * _MARGIN, 20), _INK, _font(20))
    if legend:
        picture.paste(legend, (_WIDTH, top))
    return picture


def checked(
    points: np.ndarray, labels: Optional[Sequence[int]], class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 2] float64 and labels [N] (-1: none) that fit each other. Raises ValueError if they do not."""
    points = np.asarray(points, np.float64)
    if points.size == 0:
        points = points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"points must be finite numbers [N, 2], and these are {list(points.shape)}")
    labels = np.full(len(points), -1) if labels is None else np.asarray(labels, int).reshape(-1)
    if len(labels) != len(points):
        raise ValueError(f"there are {len(points)} points and {len(labels)} labels: one each, -1 for none")
    if len(labels) and not -1 <= labels.min() <= labels.max() < max(len(class_names), 0):
        raise ValueError(f"labels must be from -1 to {len(class_names) - 1}, the numbers of the class names")
    return points, labels


def _placed(points: np.ndarray) -> tuple[np.ndarray, int]:
    """Pixels [N, 2] of the points (y upwards), and the height of the map that fits their shape."""
    low, high = (points.min(axis=0), points.max(axis=0)) if len(points) else (np.zeros(2), np.zeros(2))
    spread = high - low
    height = int(np.clip(_WIDTH * spread[1] / spread[0] if spread[0] else _WIDTH, _WIDTH * 0.35, _WIDTH * 0.85))
    room = np.array([_WIDTH, height]) - 2 * _MARGIN
    with np.errstate(divide="ignore"):
        scale = np.min(np.where(spread > 0, room / np.where(spread > 0, spread, 1), np.inf))
    scale = scale if np.isfinite(scale) else 0.0
    offsets = (points - (low + high) / 2) * scale * (1, -1)
    return offsets + (_WIDTH / 2, height / 2), height


def _dot_map(places: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", (size[0] * _OVER, size[1] * _OVER), _PAPER)
    draw = ImageDraw.Draw(picture)
    radius = _OVER * float(np.clip(130 / math.sqrt(max(len(places), 1)), 2.4, 8))
    edge = _PAPER if radius > 3 * _OVER else None
    # In random order: the last class would cover the others.
    for index in np.random.default_rng(0).permutation(len(places)):
        x, y = places[index] * _OVER
        draw_marker(draw, x, y, radius, marker_of(labels[index]), colour_of(labels[index]), edge)
    return picture.resize(size, Image.Resampling.BOX)


def _thumbnail_map(
    places: np.ndarray, labels: np.ndarray, thumbnails: Sequence[Optional[Image.Image]], size: tuple[int, int]
) -> Image.Image:
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for (x, y), label in zip(places, labels):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), _faint(colour_of(label)))
    shown = [index for index, image in enumerate(thumbnails) if image is not None]
    cell = int(np.clip(_WIDTH / math.sqrt(len(shown)) * 0.9, 44, 120))
    columns, rows = size[0] // cell, size[1] // cell
    left, top = (size[0] - columns * cell) / 2, (size[1] - rows * cell) / 2
    nearest: dict[tuple[int, int], tuple[float, int]] = {}
    for index in shown:
        x, y = (places[index][0] - left) / cell, (places[index][1] - top) / cell
        key = (min(max(int(x), 0), columns - 1), min(max(int(y), 0), rows - 1))
        distance = (x - key[0] - 0.5) ** 2 + (y - key[1] - 0.5) ** 2
        nearest[key] = min(nearest.get(key, (math.inf, -1)), (distance, index))
    frame = 3 if (labels >= 0).any() else 0
    side = cell - 4
    for (column, row), (_, index) in nearest.items():
        tile = Image.new("RGB", (side, side), colour_of(labels[index]) if frame else _PAPER)
        inner = ImageOps.fit(thumbnails[index].convert("RGB"), (side - 2 * frame,) * 2, Image.Resampling.LANCZOS)
        tile.paste(inner, (frame, frame))
        picture.paste(tile, (round(left + column * cell) + 2, round(top + row * cell) + 2))
    return picture


def draw_marker(
    draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, marker: str, fill: str, edge: Optional[str] = None
) -> None:
    """One of ``colours.MARKERS``, of about the area of a circle with ``radius``."""
    if marker == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, edge)
        return
    r = radius
    corners = {
        "square": [(-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)],
        "triangle": [(0, -1.35), (1.17, 0.68), (-1.17, 0.68)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "cross": [
            (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
            (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
        ],
    }[marker]  # fmt: skip
    draw.polygon([(x + a * r, y + b * r) for a, b in corners], fill, edge)


def _legend(labels: np.ndarray, class_names: Sequence[str]) -> Optional[Image.Image]:
    """Marker, name and number of points of each class that has some; None without classes."""
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    rows = [(int(label), class_names[label], int(counts[label])) for label in np.flatnonzero(counts)]
    if not rows:
        return None
    if (labels < 0).any():
        rows.append((-1, "no class", int((labels < 0).sum())))
    notes = []
    room = _LEGEND_ROWS * _LEGEND_COLUMNS
    if len(rows) > room:
        notes.append(f"and {len(rows) - room} more classes")
    if len(class_names) > DISTINCT:
        notes.append(f"colours repeat after {DISTINCT} classes")
    rows = rows[:room]
    texts = [f"{_short(name)}  {number}" for _, name, number in rows]
    columns = math.ceil(len(rows) / _LEGEND_ROWS)
    wide = max(int(_font(15).getlength(text)) for text in texts) + 52
    lines = min(len(rows), _LEGEND_ROWS) + len(notes)
    width = max(columns * wide, *[int(_font(15).getlength(note)) + 24 for note in notes], 120)
    picture = Image.new("RGB", (width * _OVER, (_MARGIN * 2 + lines * _LINE) * _OVER), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, ((label, _, _), text) in enumerate(zip(rows, texts)):
        x = (number // _LEGEND_ROWS * wide + 14) * _OVER
        y = (_MARGIN + (number % _LEGEND_ROWS) * _LINE + _LINE // 2) * _OVER
        draw_marker(draw, x, y, 7 * _OVER, marker_of(label), colour_of(label))
        draw.text((x + 16 * _OVER, y), text, _INK, _font(15 * _OVER), anchor="lm")
    for number, note in enumerate(notes, lines - len(notes)):
        y = (_MARGIN + number * _LINE + _LINE // 2) * _OVER
        draw.text((8 * _OVER, y), note, NO_CLASS, _font(15 * _OVER), anchor="lm")
    return picture.resize((picture.width // _OVER, picture.height // _OVER), Image.Resampling.BOX)


def _faint(colour: str) -> tuple[int, int, int]:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    red, green, blue = (round(part + (255 - part) * 0.45) for part in parts)
    return red, green, blue


def _short(name: str) -> str:
    name = _text(name)
    return name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 1] + "…"


def _text(name: str) -> str:
    """One line of Unicode: file names in another encoding have halves of characters, which no font can draw."""
    return " ".join(str(name).encode("utf-8", "replace").decode().split())


def _fitting(text: str, width: int, size: int) -> str:
    text = _text(text)
    while text and _font(size).getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its font is at hand wherever passl is installed

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
