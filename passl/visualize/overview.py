"""Labelled pictures of one size, laid out on one white sheet."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 10
_INK = (60, 60, 60)
_ASPECT = 2.4  # of the sheet: width to height, as a page shows it well
_MAX_LEAD = 0.4  # of the sheet's width
_BLANK = 0.3  # how much a blank tile costs, in units of log(aspect)


@dataclass
class Tile:
    """image: uint8 [H, W, 3]"""

    label: str
    image: np.ndarray
    crisp: bool = False  # enlarged without smoothing, as patches should be


def sheet(leading: Sequence[Tile], bands: Sequence[Sequence[Tile]], width: int = 1600) -> Image.Image:
    """At the left the ``leading`` tiles, one above the other (in a sheet of one row side by side); then the rest.

    Args:
        bands: rows of tiles, all as long; too long ones are broken, together, so that tiles of one column stay below
            each other.
        width: about so many pixels; less if the tiles would be blown up.
    """
    if not bands or not bands[0]:
        bands = [[]]
    height, tile_width = leading[0].image.shape[:2]
    aspect = tile_width / height
    columns, rows = _layout(len(bands[0]), len(bands), len(leading), aspect)
    font_size = 15
    strip = font_size + 8  # above each tile
    lead_columns = len(leading) if rows == 1 or not columns else 1
    lead_scale = 1.0 if lead_columns > 1 else rows / len(leading)
    gaps = _GAP * (columns + lead_columns + 1)
    # Labels and gaps between the rows make leading tiles taller than so many tiles, and therefore wider.
    excess = lead_columns * aspect * (lead_scale - 1) * (strip + _GAP)
    tile = _tile_size((width - gaps - excess) / (columns + lead_columns * lead_scale), aspect, height)
    cell = tile[1] + strip + _GAP
    lead_height = round(cell * lead_scale) - strip - _GAP
    lead = (max(1, round(lead_height * aspect)), lead_height)
    if lead_scale > 1 and lead[0] > _MAX_LEAD * width:  # many rows of wide pictures: two leading ones do not fill them
        lead = (round(_MAX_LEAD * width), round(_MAX_LEAD * width / aspect))
        tile = _tile_size((width - gaps - lead[0]) / columns, aspect, height)
        cell = tile[1] + strip + _GAP
    left = _GAP + lead_columns * (lead[0] + _GAP)
    bottom = max(rows * cell, (1 if lead_columns > 1 else len(leading)) * (lead[1] + strip + _GAP))
    canvas = Image.new("RGB", (left + columns * (tile[0] + _GAP), _GAP + bottom), "white")
    draw = ImageDraw.Draw(canvas)
    for index, one in enumerate(leading):
        row, column = (0, index) if lead_columns > 1 else (index, 0)
        corner = (_GAP + column * (lead[0] + _GAP), _GAP + row * (lead[1] + strip + _GAP))
        _put(canvas, draw, one, corner, lead, strip, font_size)
    for number, band in enumerate(bands):
        for index, one in enumerate(band):
            row, column = index // columns * len(bands) + number, index % columns
            corner = (left + column * (tile[0] + _GAP), _GAP + row * cell)
            _put(canvas, draw, one, corner, tile, strip, font_size)
    return canvas


def _layout(count: int, num_bands: int, num_leading: int, aspect: float) -> tuple[int, int]:
    """(columns, rows) for ``num_bands`` bands of ``count`` tiles: few blank ones, a sheet that is wide but not too."""
    if not count:
        return 0, 1
    best, choice = math.inf, (count, num_bands)
    for columns in range(1, count + 1):
        breaks = math.ceil(count / columns)
        rows = breaks * num_bands
        left = num_leading if rows == 1 else min(rows / num_leading, columns * _MAX_LEAD / (1 - _MAX_LEAD))
        cost = abs(math.log((columns + left) * aspect / rows / _ASPECT)) + _BLANK * (breaks * columns - count)
        if cost < best:
            best, choice = cost, (columns, rows)
    return choice


def _tile_size(width: float, aspect: float, height: int) -> tuple[int, int]:
    """(width, height) of a tile that may be so wide: twice its own size at most, if that is not tiny."""
    width = max(min(width, max(2.0 * height, 240.0) * aspect, 480.0 * max(aspect, 1.0)), 64.0)
    return max(1, int(width)), max(1, round(width / aspect))


def _put(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    tile: Tile,
    corner: tuple[int, int],
    size: tuple[int, int],
    strip: int,
    font_size: int,
) -> None:
    draw.text((corner[0], corner[1] + 1), tile.label, fill=_INK, font=_font(font_size))
    image = Image.fromarray(tile.image)
    is_larger = size[0] >= image.width
    resampling = Image.Resampling.NEAREST if tile.crisp and is_larger else Image.Resampling.LANCZOS
    canvas.paste(image.resize(size, resampling), (corner[0], corner[1] + strip))


@functools.cache
def _font(size: int) -> ImageFont.ImageFont:
    import matplotlib  # it brings a font, which Pillow does not

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
