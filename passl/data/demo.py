"""A small labelled data set of drawn shapes, for trying everything without a download.

A picture holds several copies of one shape, and the class is that shape alone. Colours, textures, places, sizes,
rotations and clutter are drawn independently of it, and anew for each copy. So pictures of one class
have few pixels in common, and two crops of one picture have little but the shape in common, which is what there is to
learn without labels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional, Union

import numpy as np
from PIL import Image, ImageDraw

_MARKER = "demo.json"
_DRAWING_VERSION = 3  # To be raised when the same settings give other pictures.
_SUPERSAMPLING = 4

Outline = list[tuple[float, float]]


def _regular(corners: int) -> Outline:
    return _polar((1.0, 360 * i / corners - 90) for i in range(corners))


def _polar(points: Iterable[tuple[float, float]]) -> Outline:
    return [(r * math.cos(math.radians(angle)), r * math.sin(math.radians(angle))) for r, angle in points]


def _arc(radius: float, start: float, stop: float, center_x: float = 0.0) -> Outline:
    return [(x + center_x, y) for x, y in _polar((radius, angle) for angle in np.linspace(start, stop, 40))]


def _heart() -> Outline:
    turns = np.linspace(0, 2 * math.pi, 60)
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


# Outlines around the origin with a radius of about 1, y downwards. Every outline after the first is a hole.
SHAPES: dict[str, list[Outline]] = {
    "arrow": [[(0, -1), (0.75, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.75, -0.1)]],
    "crescent": [_arc(1.0, 50, 310) + _arc(0.8, 286, 74, center_x=0.42)],
    "cross": [
        [(0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1)]
        + [(-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33), (-0.33, -1)]
    ],
    "disc": [_arc(0.95, 0, 360)],
    "heart": [_heart()],
    "hourglass": [[(-0.8, -1), (0.8, -1), (0.12, 0), (0.8, 1), (-0.8, 1), (-0.12, 0)]],
    "ring": [_arc(1.0, 0, 360), _arc(0.55, 0, 360)],
    "square": [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]],
    "star": [_polar((1.0 if i % 2 == 0 else 0.42, 36 * i - 90) for i in range(10))],
    "triangle": [_regular(3)],
}


def _area(outline: Outline) -> float:
    """Of a closed outline (the shoelace formula)."""
    x, y = np.array(outline).T
    return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2


# All shapes cover the same area at the same size, or the brightness of a picture would tell its class.
_SCALES = {
    name: math.sqrt(1.5 / (_area(outlines[0]) - sum(_area(hole) for hole in outlines[1:])))
    for name, outlines in SHAPES.items()
}


@dataclass(frozen=True)
class DemoSettings:
    """What the pictures depend on; see `make_demo`."""

    num_train_per_class: int
    num_val_per_class: int
    size: int
    seed: int
    copies: int
    clutter: float
    min_size: float
    max_size: float
    rotation: float

    def __post_init__(self) -> None:
        if min(self.num_train_per_class, self.num_val_per_class) < 1 or self.size < 8 or self.seed < 0:
            raise ValueError(f"the numbers of pictures must be positive, size at least 8, seed at least 0: {self}")
        if not 0 < self.min_size <= self.max_size <= 1:
            raise ValueError(f"sizes must satisfy 0 < min_size <= max_size <= 1: {self}")
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1: {self}")
        if not (0 <= self.clutter <= 1 and 0 <= self.rotation <= 180):
            raise ValueError(f"clutter must be in 0..1 and rotation in 0..180: {self}")


def make_demo(
    out: Union[str, os.PathLike],
    num_train_per_class: int = 500,
    num_val_per_class: int = 100,
    size: int = 48,
    seed: int = 0,
    copies: int = 14,
    clutter: float = 0.5,
    min_size: float = 0.3,
    max_size: float = 0.42,
    rotation: float = 30.0,
    progress: Optional[Callable[[int, int], None]] = None,
) -> int:
    """Write `out/{train,val}/<shape>/<number>.png` and return how many pictures were drawn.

    The same arguments give the same pictures. A data set that is complete already is left alone (0 is
    returned), one that was interrupted is completed.

    Args:
        size: side of the square pictures in pixels.
        copies: of the shape in a picture, at most.
        clutter: 0 (plain colours) to 1 (strong textures, many strokes and blobs, noise).
        min_size, max_size: diameter of the shapes as a share of the side.
        rotation: largest rotation to either side, in degrees.
        progress: called with (drawn so far, total) after each picture.

    Raises:
        FileExistsError: `out` contains something else, or a demo set with other settings.
        ValueError: an argument is out of range.
    """
    settings = DemoSettings(
        num_train_per_class, num_val_per_class, size, seed, copies, clutter, min_size, max_size, rotation
    )
    out = Path(out)
    if _is_complete(out, settings):
        return 0
    out.mkdir(parents=True, exist_ok=True)
    _write_marker(out, settings, complete=False)
    splits = (("train", settings.num_train_per_class), ("val", settings.num_val_per_class))
    total = len(SHAPES) * sum(count for _, count in splits)
    drawn = 0
    for split_number, (split, count) in enumerate(splits):
        for label, shape in enumerate(SHAPES):
            folder = out / split / shape
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([settings.seed, split_number, label, number])
                draw_picture(shape, settings, rng).save(folder / f"{number:04d}.png")
                drawn += 1
                if progress is not None:
                    progress(drawn, total)
    _write_marker(out, settings, complete=True)
    return total


def _is_complete(out: Path, settings: DemoSettings) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    marker = out / _MARKER
    if not marker.is_file():
        raise FileExistsError(f"{out} is not empty and not a demo data set: choose another folder")
    found = json.loads(marker.read_text())
    complete = found.pop("complete", None)
    wanted = _described(settings)
    if found != wanted:
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        details = ", ".join(f"{key} is {found.get(key)!r}, not {wanted[key]!r}" for key in differing)
        raise FileExistsError(f"{out} holds a demo data set with other settings ({details}): delete it first")
    return complete is True


def _write_marker(out: Path, settings: DemoSettings, complete: bool) -> None:
    temporary = out / f"{_MARKER}.tmp"
    temporary.write_text(json.dumps({**_described(settings), "complete": complete}, indent=2) + "\n")
    temporary.replace(out / _MARKER)


def _described(settings: DemoSettings) -> dict[str, float]:
    return {"drawing_version": _DRAWING_VERSION, **asdict(settings)}


def draw_picture(shape: str, settings: DemoSettings, rng: np.random.Generator) -> Image.Image:
    """One RGB picture of `shape`, a name in SHAPES; everything else about it is drawn from `rng`."""
    contrast = 40 * settings.clutter
    picture = _with_clutter(_patchwork(settings.size, rng), settings.clutter, rng)
    for y, x, radius in _places(settings, rng):
        foreground = _texture(settings.size, _bright_color(rng), contrast, rng)
        picture = Image.composite(foreground, picture, _mask(shape, settings, y, x, radius, rng))
    noise = rng.normal(0, contrast / 5, (settings.size, settings.size, 3))
    return _to_image(np.asarray(picture) + noise)


def _places(settings: DemoSettings, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Row and column of the centre, and radius, of each copy, as shares of the side: hardly overlapping.

    The borders cut copies. If they kept copies out, few places would be left, and the pixels would give the
    class away.
    """
    places: list[tuple[float, float, float]] = []
    for _ in range(settings.copies):
        for _ in range(50):
            radius = rng.uniform(settings.min_size, settings.max_size) / 2
            center = rng.uniform(-0.6 * radius, 1 + 0.6 * radius, 2)
            y, x = center.tolist()  # plain numbers: this is half of the drawing otherwise
            if all(math.hypot(y - row, x - column) > 0.85 * (radius + reach) for row, column, reach in places):
                places.append((y, x, radius))
                break
    return places


def _patchwork(size: int, rng: np.random.Generator) -> Image.Image:
    """Soft patches of dark colours: none is that of the whole picture."""
    return _to_image(rng.uniform(0, 110, (4, 4, 3))).resize((size, size), Image.Resampling.BICUBIC)


def _to_image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _mask(
    shape: str, settings: DemoSettings, y: float, x: float, radius: float, rng: np.random.Generator
) -> Image.Image:
    """Where the shape is, antialiased: mode L, 255 inside. Centre and radius are shares of the side."""
    side = settings.size * _SUPERSAMPLING
    radius = radius * side * _SCALES[shape]
    center_x, center_y = x * side, y * side
    angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
    stretch_x, stretch_y = rng.uniform(0.85, 1.0, 2)
    cosine, sine = radius * math.cos(angle), radius * math.sin(angle)
    mask = Image.new("L", (side, side), 0)
    for hole, outline in enumerate(SHAPES[shape]):
        points = [(x * stretch_x, y * stretch_y) for x, y in outline]
        turned = [(center_x + x * cosine - y * sine, center_y + x * sine + y * cosine) for x, y in points]
        ImageDraw.Draw(mask).polygon(turned, fill=0 if hole else 255)
    return mask.reduce(_SUPERSAMPLING)


def _bright_color(rng: np.random.Generator) -> np.ndarray:
    """Any hue, lighter than what is behind: a shape is to be visible however it is coloured."""
    color = rng.uniform(0, 1, 3)
    return 110 + 145 * color / color.max()


def _texture(size: int, color: np.ndarray, contrast: float, rng: np.random.Generator) -> Image.Image:
    """`color` with a smooth variation and stripes of random direction, width and contrast."""
    grid = _to_image(color + rng.normal(0, contrast, (4, 4, 3)))
    smooth = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    direction, phase = rng.uniform(0, 2 * math.pi, 2)
    along = np.linspace(0, 2 * math.pi * rng.uniform(2, 8), size)
    stripes = np.sin(along * math.cos(direction) + along[:, None] * math.sin(direction) + phase)
    return _to_image(smooth + stripes[..., None] * rng.uniform(0, contrast, 3))


def _with_clutter(picture: Image.Image, clutter: float, rng: np.random.Generator) -> Image.Image:
    """`picture` with up to 24 short strokes and small blobs, antialiased."""
    side = picture.width * _SUPERSAMPLING
    picture = picture.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.binomial(24, clutter)):
        color = tuple(int(value) for value in rng.integers(0, 140, 3))
        x, y = rng.uniform(0, side, 2)
        if rng.random() < 0.5:
            dx, dy = rng.uniform(-0.3, 0.3, 2) * side
            draw.line((x, y, x + dx, y + dy), fill=color, width=int(rng.integers(2, 5)))
        else:
            rx, ry = rng.uniform(0.02, 0.07, 2) * side
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=color)
    return picture.reduce(_SUPERSAMPLING)
