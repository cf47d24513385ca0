"""DAVIS 2017 on disk: its sequences, frames and palette masks.

The layout is the public one: `JPEGImages/{resolution}/{sequence}/*.jpg`, `Annotations/{resolution}/{sequence}/*.png`
and `ImageSets/{year}/{split}.txt`, with the name of a sequence in each line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from PIL import Image

from passl.data.errors import UnreadableImageError
from passl.data.image_io import read_source
from passl.formats.atomic import replacing

VOID = 255  # in a mask: a pixel that nobody annotated


def _palette() -> bytes:
    """The colours of DAVIS's masks: those of PASCAL VOC with 191 for 192, and greys from number 22 on."""
    colours = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    for number in range(22):
        bits = [(number >> place) & 1 for place in range(6)]
        colours[number] = [min(128 * bits[i] + 64 * bits[i + 3], 191) for i in range(3)]
    return colours.tobytes()


PALETTE = _palette()


@dataclass(frozen=True)
class VideoSequence:
    """One video. frames: its files in order; masks: the file of the annotation by the frame's name, in order."""

    name: str
    frames: list[str]
    masks: dict[str, str]


def find_sequences(root: str, split: str = "val", resolution: str = "480p", year: str = "2017") -> list[VideoSequence]:
    """The sequences that a split names, in its order.

    Raises:
        FileNotFoundError: a folder or file is missing; each frame must have its mask, and each mask its frame.
        ValueError: a sequence is too short to be measured, or the split is no list of names.
    """
    if Path(split).name != split:
        raise ValueError(f"split ({split!r}) must be the name of a list in ImageSets/{year}, such as val")
    folder = Path(root).expanduser()
    listing = folder / "ImageSets" / year / f"{split}.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"there is no file {listing}: root must hold JPEGImages, Annotations and ImageSets")
    lines = listing.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{listing} names no sequences")
    wrong = [name for name in names if Path(name).name != name or name == ".." or names.count(name) > 1]
    if wrong:
        raise ValueError(f"{listing}: {wrong[0]!r} occurs twice, or is no name of a folder")
    return [_sequence(folder, resolution, name) for name in names]


def _sequence(folder: Path, resolution: str, name: str) -> VideoSequence:
    frames = _files(folder / "JPEGImages" / resolution / name, ".jpg")
    masks = {Path(mask).stem: mask for mask in _files(folder / "Annotations" / resolution / name, ".png")}
    stems = [Path(frame).stem for frame in frames]
    for stem, frame in zip(stems, frames):
        if stem not in masks:
            raise FileNotFoundError(f"sequence {name}: the frame {frame} has no mask {stem}.png")
    for stem in sorted(masks.keys() - set(stems)):
        raise FileNotFoundError(f"sequence {name}: {masks[stem]} has no frame {stem}.jpg")
    if len(frames) < 3:
        raise ValueError(
            f"sequence {name} has too few frames ({len(frames)}): it takes 3, as first and last are not measured"
        )
    return VideoSequence(name, frames, masks)


def _files(folder: Path, suffix: str) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    names = sorted(name for name in os.listdir(folder) if name.endswith(suffix) and not name.startswith("."))
    found = [os.fspath(folder / name) for name in names]
    if not found:
        raise FileNotFoundError(f"{folder} contains no {suffix} files")
    return found


def read_frame(path: str) -> np.ndarray:
    """The image as OpenCV decodes it, RGB: [H, W, 3] uint8. Raises UnreadableImageError."""
    data = np.frombuffer(read_source(path).data, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise UnreadableImageError(path, "empty, damaged or not an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def frame_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width that the official code gives a frame: the shorter side as told, the longer one in proportion
    and rounded down to a multiple of 64.

    Raises:
        ValueError: nothing is left of the longer side.
    """
    longer = short_side * max(height, width) / min(height, width) // 64 * 64
    if longer < 1:
        raise ValueError(f"a frame of {height} x {width} pixels needs a shorter side of at least 64, not {short_side}")
    return (int(longer), short_side) if height > width else (short_side, int(longer))


def read_mask(path: str) -> tuple[np.ndarray, Optional[bytes]]:
    """The numbers of the objects, [H, W] uint8, and the palette (768 bytes), if the file has one.

    Raises:
        UnreadableImageError: the file is damaged, or its pixels are colours and not numbers.
    """
    with read_source(path).opened() as image:
        image.load()
        if image.mode not in ("P", "L", "1"):
            raise UnreadableImageError(path, f"a mask must be a palette or grey image, not {image.mode}")
        palette = image.getpalette() if image.mode == "P" else None
        numbers = np.asarray(image).astype(np.uint8)
    if palette is None:
        return numbers, None
    return numbers, bytes(palette) + PALETTE[len(palette) :]


def write_mask(path: Path, numbers: np.ndarray, palette: bytes = PALETTE) -> None:
    """A palette PNG of the numbers of objects, [H, W] uint8."""
    image = Image.fromarray(numbers)
    image.putpalette(palette)
    with replacing(path) as file:
        image.save(file, format="PNG")


def resize_mask(numbers: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] uint8 -> [height, width]: of each pixel the nearest, as Pillow does it."""
    return np.asarray(Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST))
