"""A map of images as a page to explore: one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from PIL import Image, ImageOps

from passl.visualize.colours import colour_of, marker_of
from passl.visualize.scatter import checked
from passl.visualize.scatter_script import SCRIPT, STYLE

SIDE = 64  # pixels of a thumbnail
_PER_ROW = 32
_PER_SHEET = _PER_ROW**2  # small sheets: browsers draw from them without holding all pixels of all images
_QUALITY = 80
_STEPS = 100_000  # places of points on the longer side of the map: shorter to write than fractions

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>html, body {{ margin: 0; height: 100%; }} body > .passl-map {{ height: 100%; border: 0; }}</style>
</head>
<body>
{fragment}
</body>
</html>
"""
_FRAGMENT = """\
<div class="passl-map">
<style>{style}</style>
<script type="application/json">{data}</script>
</div>
<script>{script}</script>
"""


def scatter_html(
    points: np.ndarray,
    labels: Optional[Sequence[int]],
    class_names: Sequence[str],
    names: Sequence[str],
    thumbnails: Optional[Sequence[Optional[Image.Image]]],
) -> str:
    """A whole page, self-contained, with what :func:`scatter_fragment` gives; its arguments and errors."""
    fragment = scatter_fragment(points, labels, class_names, names, thumbnails)
    return _PAGE.format(title=html.escape(f"Map of {len(names)} images"), fragment=fragment)


def scatter_fragment(
    points: np.ndarray,
    labels: Optional[Sequence[int]],
    class_names: Sequence[str],
    names: Sequence[str],
    thumbnails: Optional[Sequence[Optional[Image.Image]]],
) -> str:
    """Points [N, 2] to pan, zoom, point at and search, as a ``<div>`` and a ``<script>`` for the body of any page.

    It has no ids and no global names: a page may hold several. Its ``<div class="passl-map">`` fills the width it is
    given and is 640 pixels high unless the page says otherwise. After drawing, ``data-drawn`` of its canvas is the
    number of points on it.

    Args:
        labels: [N], numbers of ``class_names``, -1 for no class; None: there are no classes.
        names: [N], shown as text whatever they are.
        thumbnails: [N], in any size, None for a point without one; or None. About 2 KB each in the result.

    Raises:
        ValueError: points are not finite, or lengths differ.
    """
    points, labels = checked(points, labels, class_names)
    for given, what in ((names, "names"), (thumbnails, "thumbnails")):
        if given is not None and len(given) != len(points):
            raise ValueError(f"there are {len(points)} points and {len(given)} {what}: one each")
    places, sheets = _sprites(thumbnails or [None] * len(points))
    used = sorted(set(labels.tolist()) - {-1}) if len(labels) else []
    data = {
        "points": _whole_numbers(points),
        "labels": labels.tolist(),
        "classes": [
            {"label": label, "name": _text(class_names[label]), "colour": colour_of(label), "marker": marker_of(label)}
            for label in used
        ],
        "none": {"label": -1, "name": "no class", "colour": colour_of(-1), "marker": marker_of(-1)},
        "names": [_text(name) for name in names],
        "thumbnails": places,
        "sheets": sheets,
        "side": SIDE,
        "perRow": _PER_ROW,
        "perSheet": _PER_SHEET,
    }
    return _FRAGMENT.format(style=STYLE, data=_json(data), script=SCRIPT)


def _whole_numbers(points: np.ndarray) -> list[list[int]]:
    """[N, 2] in 0.._STEPS, with one scale for both axes."""
    if not len(points):
        return []
    low, high = points.min(axis=0), points.max(axis=0)
    scale = _STEPS / (float((high - low).max()) or 1.0)
    return np.rint((points - low) * scale).astype(int).tolist()


def _sprites(thumbnails: Sequence[Optional[Image.Image]]) -> tuple[list[int], list[str]]:
    """The place of each thumbnail in the sheets (-1: none), and the sheets as data URIs."""
    shown = [index for index, image in enumerate(thumbnails) if image is not None]
    places = [-1] * len(thumbnails)
    sheets = []
    for start in range(0, len(shown), _PER_SHEET):
        part = shown[start : start + _PER_SHEET]
        sheet = Image.new("RGB", (SIDE * min(len(part), _PER_ROW), SIDE * -(-len(part) // _PER_ROW)))
        for place, index in enumerate(part):
            image = ImageOps.fit(thumbnails[index].convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(image, (place % _PER_ROW * SIDE, place // _PER_ROW * SIDE))
            places[index] = start + place
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=_QUALITY)
        sheets.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return places, sheets


def _text(name: object) -> str:
    """As Unicode: file names in another encoding have halves of characters, which no file could hold."""
    return str(name).encode("utf-8", "replace").decode()


def _json(data: Any) -> str:
    """For the inside of a ``<script>``, which any ``</script`` or ``<!--`` in a name would break."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
