"""The files about one image: the official ones, and the overview."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import paddle
from paddle import nn
from PIL import Image

from passl.formats.atomic import replacing
from passl.visualize.attention import overview, similarity_overview
from passl.visualize.attention_image import Prepared, picture_of
from passl.visualize.attention_maps import map_png, shaded, top_mass_masks, upsampled
from passl.visualize.attention_view import View, similarity
from passl.visualize.boxes import boxes

DEFAULT_THRESHOLD = 0.6


def write_attention(
    folder: Path,
    backbone: nn.Layer,
    name: str,
    prepared: Prepared,
    view: View,
    threshold: Optional[float] = None,
    cmap: str = "inferno",
) -> None:
    """``img.png``, ``attn-head{j}.png``, ``overview.png``; with a threshold ``mask_th{t}_head{j}.png``, ``boxes.json``.

    Args:
        name: of the image, for ``boxes.json``.
        threshold: share of the attention that a mask holds.
        cmap: colours of the overview; the official files are in viridis.

    Raises:
        ValueError: the backbone has no such attention.
        OSError: ``folder`` cannot be written to.
    """
    maps, names = view.maps(backbone, paddle.to_tensor(prepared.tensor[None]))
    maps, image = maps[0], picture_of(prepared.tensor)
    folder.mkdir(parents=True, exist_ok=True)
    write_png(folder / "img.png", image)
    for one, map_name in zip(upsampled(maps, *prepared.size), names):
        _write(folder / f"attn-{map_name}.png", map_png(one))
    masks = None
    if threshold is not None:
        masks = top_mass_masks(maps, threshold)
        for mask, map_name in zip(upsampled(masks, *prepared.size), names):
            write_png(folder / f"mask_th{threshold}_{map_name}.png", shaded(image, mask))
        _write_boxes(folder, name, prepared, dict(zip(names, masks)), maps, threshold, view.layer)
    labels = [map_name.replace("head", "head ") for map_name in names]
    write_png(folder / "overview.png", overview(image, maps, masks, labels, cmap))


def _write_boxes(
    folder: Path,
    name: str,
    prepared: Prepared,
    masks: dict[str, np.ndarray],
    maps: np.ndarray,
    threshold: float,
    layer: int,
) -> None:
    if len(maps) > 1:
        masks = {**masks, "mean": top_mass_masks(maps.mean(0, keepdims=True), threshold)[0]}
    content = {
        "image": os.fsencode(name).decode(errors="replace"),
        "original_size": list(prepared.original),
        "size": list(prepared.size),
        "grid": list(maps.shape[1:]),
        "layer": layer,
        "threshold": threshold,
        "boxes": {map_name: boxes(mask, prepared) for map_name, mask in masks.items()},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # Lists of numbers on one line.
    text = re.sub(
        r"\[[-\d.,\s]+\]", lambda found: " ".join(found.group().split()).replace("[ ", "[").replace(" ]", "]"), text
    )
    _write(folder / "boxes.json", text.encode())


def write_similarity(
    folder: Path,
    backbone: nn.Layer,
    prepared: Prepared,
    place: tuple[float, float],
    layer: int = -1,
    cmap: str = "inferno",
) -> None:
    """``img.png``, ``similarity.png`` (from the smallest to the largest cosine, viridis) and ``overview.png``.

    place: (x, y) of the chosen patch, in pixels of the original image.

    Raises:
        ValueError: see :func:`passl.visualize.attention_view.similarity`.
        OSError: ``folder`` cannot be written to.
    """
    cosines, patch = similarity(backbone, prepared, *place, layer)
    image = picture_of(prepared.tensor)
    folder.mkdir(parents=True, exist_ok=True)
    write_png(folder / "img.png", image)
    _write(folder / "similarity.png", map_png(upsampled(cosines, *prepared.size)))
    write_png(folder / "overview.png", similarity_overview(image, cosines, patch, cmap))


def write_png(path: Path, image: object) -> None:
    """A Pillow image or uint8 array [H, W, 3]"""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG")
    _write(path, file.getvalue())


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def folder_names(paths: Sequence[str]) -> list[str]:
    """A folder's name for each image: its own without the extension, with it where that is not enough, or numbered.

    They differ in more than upper and lower case, and none can lead elsewhere.
    """
    names = [os.fsencode(os.path.basename(path)).decode(errors="replace") for path in paths]
    stems = [os.path.splitext(name)[0].strip(". ") or "image" for name in names]
    counts: dict[str, int] = {}
    for stem in stems:
        counts[stem.casefold()] = counts.get(stem.casefold(), 0) + 1
    taken, result = set(), []
    for name, stem in zip(names, stems):
        wanted = stem if counts[stem.casefold()] == 1 else name.strip(". ")
        candidate, number = wanted, 1
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{wanted}-{number}"
        taken.add(candidate.casefold())
        result.append(candidate)
    return result
