"""Reading image files: any that Pillow can open as an 8-bit RGB image, or as they are stored."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np
from PIL import Image, ImageOps

from passl.data.errors import UnreadableImageError
from passl.data.raw_images import TIFF_MAGICS, exif_orientation, is_eight_bit, read_array, reason_of

# What transforms get: 8-bit RGB as Pillow's, all else as an array [H, W, C].
AnyImage = Union[Image.Image, np.ndarray]
# Formats that Pillow registers a reader for without being able to decode them by itself.
_UNDECODABLE_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_SAY_CHANNELS = "say what it is in the configuration's section Data, such as Data.channels=3"


@functools.cache
def image_extensions(channels: Optional[int] = None) -> frozenset[str]:
    """Lower-case file extensions, with the dot, of all formats this Pillow can decode; with `channels` also `.npy`."""
    formats = Image.registered_extensions()
    readable = Image.OPEN.keys() - _UNDECODABLE_FORMATS
    found = {extension for extension, image_format in formats.items() if image_format in readable}
    return frozenset(found if channels is None else {*found, ".npy"})


@dataclass(frozen=True)
class ImageSource:
    """The bytes of an image file, not decoded yet.

    Attributes:
        name: the file's path, or `tarball!member`.
        channels: None: every image becomes 8-bit RGB. A number: images are read as they are stored, and must have so
            many channels; 3 still turns files of 8 bits into RGB.
    """

    name: str
    data: bytes
    channels: Optional[int] = None

    @property
    def is_raw(self) -> bool:
        """Whether the image is to be read as it is stored, being something else than 8-bit RGB."""
        return self.channels is not None and not (self.channels == 3 and is_eight_bit(self.data))

    def image(self) -> AnyImage:
        """The decoded image: in mode RGB, or, where `channels` asks for what that cannot hold, an array [H, W, C].

        Raises:
            UnreadableImageError: see `rgb` and `passl.data.raw_images.read_array`.
        """
        if not self.is_raw:
            return self.rgb()
        array = read_array(self.name, self.data, self.channels)
        if self.channels == 3 and array.dtype == np.uint8:
            return Image.fromarray(array)
        return array

    def rgb(self) -> Image.Image:
        """The image (its first frame), decoded completely, in mode RGB.

        - Grey, palette, CMYK and other 8-bit modes: Pillow's `convert("RGB")`; transparency is dropped, not
          blended, as the official code does.
        - 16-bit, 32-bit and float images: reduced by `reduce_to_8_bit` (Pillow itself would clip to white).
        - An EXIF orientation is applied: the image is returned upright.

        Raises:
            UnreadableImageError: empty, truncated, damaged or not an image, or larger than
                `PIL.Image.MAX_IMAGE_PIXELS` allows (a decompression bomb).
        """
        with self.opened() as image:
            image.load()
            return to_rgb(_upright(image))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Image.Image]:
        """The image as `PIL.Image.open` gives it: its header is read, its pixels are not.

        Whatever goes wrong inside of the `with` block, there too, is an UnreadableImageError.
        """
        if not self.data:
            raise UnreadableImageError(self.name, "the file is empty (0 bytes)")
        try:
            with Image.open(io.BytesIO(self.data)) as image:
                yield image
        except (UnreadableImageError, MemoryError):
            raise
        # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError ... for damaged
        # files: there is no narrower common class.
        except Exception as error:
            if self.data.startswith(b"\x93NUMPY"):
                raise UnreadableImageError(self.name, f"an array, not a picture: {_SAY_CHANNELS}") from error
            reason = reason_of(error)
            if isinstance(error, Image.UnidentifiedImageError) and self.data.startswith(TIFF_MAGICS):
                reason = f"a TIFF that is damaged, or that Pillow has no mode for: {_SAY_CHANNELS}"
            raise UnreadableImageError(self.name, reason) from error


def read_source(path: Union[str, os.PathLike], channels: Optional[int] = None) -> ImageSource:
    """The bytes of the file `path`. Raises UnreadableImageError when it is missing, no file, or cannot be read."""
    path = os.fspath(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableImageError(path, "not a regular file")
            return ImageSource(path, file.read(), channels)
    except OSError as error:
        raise UnreadableImageError(path, reason_of(error)) from error


def _open_at_once(path: str, flags: int) -> int:
    # A pipe that nobody writes to would be waited for, for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_rgb(path: Union[str, os.PathLike]) -> Image.Image:
    """The image file `path` in mode RGB, see `ImageSource.rgb`."""
    return read_source(path).rgb()


def to_rgb(image: Image.Image) -> Image.Image:
    """The decoded `image` in mode RGB (the same object if it already is)."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(reduce_to_8_bit(np.asarray(image)))
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Same colours as the direct conversion, without Pillow's warning for each file.
        image = image.convert("RGBA")
    return image.convert("RGB")


def reduce_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values `[H, W]` of a 16-bit, 32-bit or float image as uint8.

    16-bit values keep their high byte, which is what Pillow does when it reads 16-bit RGB. The other types
    carry no agreed range, so white is the smallest of 1 (floats only), 255 and 65535 that no value exceeds;
    images with negative or larger values are stretched from their minimum to their maximum. NaN becomes
    black.
    """
    if values.dtype.kind == "u":
        return (values >> 8).astype(np.uint8)
    levels = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    black = 0.0
    white = next((level for level in levels if low >= 0 and high <= level), None)
    if white is None:
        black, white = low, high if high > low else low + 1.0  # An image of one value becomes black.
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    return np.rint((values - black) * (255.0 / (white - black))).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if exif_orientation(image) != 1 else image
