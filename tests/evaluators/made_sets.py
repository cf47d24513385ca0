"""Small sets in the public layouts of the benchmarks, made of plain colours, so that the answers are known."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from passl.data.davis import write_mask

# Features that are colours have their angles to black only where nothing is subtracted.
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_OBJECT_COLOURS = np.array([[20, 20, 160], [200, 30, 30], [30, 200, 30]], np.uint8)


def colour(angle: float) -> tuple[int, int, int]:
    """Between red (0 degrees) and green (90): the nearer the angles, the more similar the colours."""
    radians = np.deg2rad(angle)
    return int(250 * np.cos(radians)), int(250 * np.sin(radians)), 0


def write_retrieval(
    root: Path,
    database: Sequence[float],
    queries: Sequence[float],
    gnd: Sequence[Mapping[str, Any]],
    protocol: int = 2,
    size: tuple[int, int] = (40, 30),
) -> str:
    """Images of the given angles and of several sizes as roxford5k, with its ground truth in a pickle."""
    folder = root / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    for kind, angles in (("image", database), ("query", queries)):
        for number, angle in enumerate(angles):
            image = Image.new("RGB", (size[0] + 7 * number, size[1] + 3 * number), colour(angle))
            image.save(folder / "jpg" / f"{kind}{number}.jpg", quality=95)
    content = {
        "imlist": [f"image{i}" for i in range(len(database))],
        "qimlist": [f"query{i}" for i in range(len(queries))],
        "gnd": [{"bbx": [0, 0, 20, 20], **entry} for entry in gnd],
    }
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, protocol))
    return str(root)


def write_block(folder: Path, angles: Mapping[str, float]) -> None:
    """Images of one folder of Copydays. angles: of each file by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, angle in angles.items():
        Image.new("RGB", (24, 20), colour(angle)).save(folder / f"{name}.jpg", quality=95)


def write_copydays(root: Path, originals: Mapping[str, float], strong: Mapping[str, float]) -> str:
    write_block(root / "original", originals)
    write_block(root / "strong", strong)
    return str(root)


def box_mask(boxes: Sequence[tuple[int, int, int, int]], height: int = 64, width: int = 128) -> np.ndarray:
    """boxes: left, top, right and bottom of objects 1, 2 ..."""
    mask = np.zeros((height, width), np.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        mask[top:bottom, left:right] = number
    return mask


def moving(steps: Sequence[int], length: int = 6) -> list[np.ndarray]:
    """Masks of upright bands 24 pixels wide, each of which moves by so many pixels a frame.

    Bands, as bilinear maps round the corners of boxes.
    """
    starts = [8, 96][: len(steps)]
    return [box_mask([(x + i * dx, 0, x + i * dx + 24, 64) for x, dx in zip(starts, steps)]) for i in range(length)]


def write_video(
    root: Path, name: str, masks: Sequence[np.ndarray], frames: Optional[Sequence[np.ndarray]] = None
) -> str:
    """One more video of DAVIS, in which each object has a colour of its own.

    frames: masks of what the frames show, if not their annotations.
    """
    images, annotations = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    for number, shown in enumerate(masks if frames is None else frames):
        Image.fromarray(_OBJECT_COLOURS[shown]).save(images / f"{number:05d}.jpg", quality=100, subsampling=0)
    for number, mask in enumerate(masks):
        write_mask(annotations / f"{number:05d}.png", mask)
    listing = root / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("a") as file:
        file.write(f"{name}\n")
    return str(root)


def write_all(folder: Path) -> None:
    """Sets for all three, each in a folder of its evaluator's name."""
    gnd = [{"easy": [0], "hard": [3], "junk": [1]}, {"easy": [5, 4], "hard": [2], "junk": []}]
    write_retrieval(folder / "ImageRetrieval", [5, 15, 25, 40, 60, 80], [0, 90], gnd)
    originals = {"200000": 5, "200100": 25, "200200": 60}
    write_copydays(folder / "CopyDetection", originals, {"200101": 22, "200102": 50, "200201": 64})
    for number, steps in enumerate(([8, -8], [8], [-8, 8])):
        write_video(folder / "VideoSegmentation", f"video{number}", moving(steps, 4))
