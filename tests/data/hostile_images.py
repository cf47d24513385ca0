"""Image files as they are found in the wild: whole ones of every kind, and every kind of broken one."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

GOOD, BAD, EITHER = "good", "bad", "either"  # either: damage that a decoder may or may not notice
Content = bytes
Kind = Callable[[np.random.Generator], "tuple[str, Content, str]"]  # -> extension, bytes, what it is

_ORIENTATION = 0x0112
_MODES = {  # formats that can hold a mode of Pillow
    "1": ("png", "tiff", "bmp"),
    "L": ("jpeg", "png", "webp"),
    "LA": ("png", "tiff"),
    "P": ("png", "gif", "tiff"),
    "PA": ("tiff",),
    "RGB": ("jpeg", "png", "webp", "bmp", "tiff", "ppm", "tga"),
    "RGBA": ("png", "webp", "tiff"),
    "RGBX": ("tiff",),
    "CMYK": ("jpeg", "tiff"),
    "YCbCr": ("jpeg", "tiff"),
    "LAB": ("tiff",),
    "I": ("tiff",),
    "F": ("tiff",),
    "I;16": ("png", "tiff"),
    "I;16B": ("tiff",),
}


def write(folder: Path, count: int, seed: int = 0, classes: int = 2) -> dict[str, str]:
    """`count` files of all kinds in turn, in `folder/class{c}`; returns path -> GOOD, BAD or EITHER."""
    kinds = list(_kinds())
    found = {}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        extension, content, what = kinds[number % len(kinds)](rng)
        path = folder / f"class{number % classes}" / f"{number:05d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        found[str(path)] = what
    return found


def write_special(folder: Path) -> list[str]:
    """Things with the names of images that are no files: a dangling link, a pipe that nobody writes to."""
    dangling, pipe = folder / "class0" / "dangling.jpg", folder / "class0" / "pipe.png"
    dangling.symlink_to(folder / "nowhere.jpg")
    os.mkfifo(pipe)
    return [str(dangling), str(pipe)]


def _kinds() -> Iterator[Kind]:
    for mode, formats in _MODES.items():
        for name in formats:
            yield lambda rng, mode=mode, name=name: (name, _encoded(_image(rng, mode), name), GOOD)
    for orientation in (*range(1, 9), 0, 9, 4711):
        yield lambda rng, value=orientation: ("jpg", _oriented(rng, value), GOOD)
    yield lambda rng: ("jpg", _with_broken_exif(rng), GOOD)
    for size in ((1, 1), (1, 5000), (5000, 1), (2, 3), (1, 2)):
        yield lambda rng, size=size: ("png", _encoded(_image(rng, "RGB", size), "png"), GOOD)
        yield lambda rng, size=size: ("jpg", _encoded(_image(rng, "RGB", size), "jpeg"), GOOD)
    for name in ("gif", "png", "webp", "tiff"):
        yield lambda rng, name=name: (name, _animated(rng, name), GOOD)
    for content, extension in (("png", "jpg"), ("jpeg", "png"), ("gif", "jpg"), ("webp", "bmp")):
        yield lambda rng, c=content, e=extension: (e, _encoded(_image(rng, "RGB"), c), GOOD)
    yield lambda rng: ("JPG", _encoded(_image(rng, "RGB"), "jpeg", progressive=True), GOOD)

    for extension in ("jpg", "png", "tiff", "webp"):
        yield lambda rng, e=extension: (e, b"", BAD)
    yield lambda rng: ("jpg", b"<html><body>404 Not Found</body></html>", BAD)
    yield lambda rng: ("png", rng.bytes(int(rng.integers(1, 4000))), BAD)
    yield lambda rng: ("jpg", b"\xff\xd8\xff\xe0" + rng.bytes(50), BAD)
    for name in ("jpeg", "png", "gif", "bmp", "ppm", "tga"):
        for share in (0.05, 0.5, 0.9):
            yield lambda rng, n=name, s=share: (n, _cut(_encoded(_noise(rng), n), s), BAD)
    for name in ("tiff", "webp"):
        yield lambda rng, n=name: (n, _cut(_encoded(_noise(rng), n), 0.5), BAD)
    for name in ("jpeg", "png", "gif", "tiff", "webp", "bmp"):
        yield lambda rng, n=name: (n, _damaged(_encoded(_noise(rng), n), rng), EITHER)

    yield lambda rng: ("png", _png(60_000, 60_000, 1, 0, zlib.compress(b"\0" * 100_000)), BAD)  # claims only
    yield lambda rng: ("png", _png(20_000, 20_000, 1, 0, _blank(20_000, 2501)), BAD)  # a bomb: 50 kB -> 400 M pixels
    yield lambda rng: ("png", _png(0, 10, 8, 2, zlib.compress(b"")), BAD)
    yield lambda rng: ("png", _png(8, 8, 8, 2, _blank(8, 25), text=zlib.compress(b"a" * 100_000_000)), EITHER)
    yield lambda rng: ("gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", BAD)
    yield lambda rng: ("bmp", _giant_bmp(), BAD)


def _image(rng: np.random.Generator, mode: str, size: tuple[int, int] = (0, 0)) -> Image.Image:
    width, height = size if size[0] else (int(rng.integers(20, 60)), int(rng.integers(20, 60)))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    if mode.startswith("I;16"):
        deep = rng.integers(0, 65536, (height, width), np.uint16)
        image = Image.fromarray(deep)
        if mode == "I;16":
            return image
        return Image.frombytes(mode, (width, height), deep.astype(">u2").tobytes())
    image = Image.fromarray(pixels)
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), pixels.tobytes())
    if mode in ("PA", "LA"):
        image = image.convert(mode[0])
        alpha = Image.fromarray(pixels[..., 0])
        image = image.convert(mode)
        image.putalpha(alpha)
        return image
    return image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)


def _noise(rng: np.random.Generator) -> Image.Image:
    """Large enough that what is cut off is image data."""
    return _image(rng, "RGB", (90, 80))


def _encoded(image: Image.Image, name: str, **options: object) -> Content:
    file = io.BytesIO()
    if name == "gif" and image.mode == "RGB":
        image = image.convert("P")
    image.save(file, name, **options)
    return file.getvalue()


def _oriented(rng: np.random.Generator, value: int) -> Content:
    exif = Image.Exif()
    exif[_ORIENTATION] = value
    return _encoded(_image(rng, "RGB"), "jpeg", exif=exif)


def _with_broken_exif(rng: np.random.Generator) -> Content:
    return _encoded(_image(rng, "RGB"), "jpeg", exif=b"Exif\0\0MM\0*" + rng.bytes(30))


def _animated(rng: np.random.Generator, name: str) -> Content:
    frames = [_image(rng, "RGB", (30, 20)) for _ in range(3)]
    file = io.BytesIO()
    frames[0].save(file, name, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _cut(content: Content, share: float) -> Content:
    return content[: int(len(content) * share)]


def _damaged(content: Content, rng: np.random.Generator) -> Content:
    data = np.frombuffer(content, np.uint8).copy()
    places = rng.integers(min(20, len(data) - 1), len(data), 1 + len(data) // 200)
    data[places] = rng.integers(0, 256, len(places))
    return data.tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int, color: int, pixels: bytes, text: bytes = b"") -> Content:
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))]
    if text:
        chunks.append(_chunk(b"zTXt", b"Comment\0\0" + text))
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")])


def _blank(rows: int, row_bytes: int) -> bytes:
    """Compressed rows of zeros, the filter byte included."""
    return zlib.compress(b"\0" * (rows * row_bytes), 9)


def _giant_bmp() -> Content:
    header = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header
