"""Reading images as they are stored: any number of channels, 8 or 16 bits, floats; TIFF, `.npy`, and all that Pillow
opens.

An array's type says the scale of its values: uint8 is divided by 255 and uint16 by 65535 before anything is computed
with them (`unit_floats`), floats and other integers count as they are.
"""

from __future__ import annotations

import io
import logging
import math
import struct
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from PIL import Image

from passl.data.errors import UnreadableImageError

_NPY_MAGIC, _PNG_MAGIC = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG_MAGIC = b"\xff\xd8\xff"
_FULL_SCALE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
_LARGEST = float(np.finfo(np.float32).max)
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_MAX_COMPRESSION = 100  # of huge images; empty ones in deflate reach 1000


# --- scale ---


def full_scale(dtype: np.dtype) -> float:
    """What a value of this type is divided by."""
    return _FULL_SCALE.get(np.dtype(dtype), 1.0)


def unit_floats(array: np.ndarray) -> np.ndarray:
    """`array` as float32: 8-bit values / 255, 16-bit values / 65535, all others as they are."""
    scale = full_scale(array.dtype)
    if scale == 1.0:
        return array.astype(np.float32, copy=False)
    return np.divide(array, np.float32(scale), dtype=np.float32)


# --- reading ---


def is_eight_bit(data: bytes) -> bool:
    """Whether Pillow reads the image file `data` as RGB without loss of bits. Reads the header alone; a file that
    nobody can open counts as one."""
    if data.startswith(_JPEG_MAGIC):
        return True
    if data.startswith(_PNG_MAGIC):
        return len(data) <= 24 or data[24] <= 8
    if data.startswith(_NPY_MAGIC):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            if data.startswith(TIFF_MAGICS):
                bits = image.tag_v2.get(_BITS_PER_SAMPLE, 1)
                return max(bits if isinstance(bits, tuple) else (bits,)) <= 8
            return not (image.mode in ("I", "F") or image.mode.startswith("I;16"))
    # Pillow's errors for damaged files have no common class below Exception. What it cannot open may be a TIFF that
    # tifffile can.
    except Exception:
        return not data.startswith(TIFF_MAGICS)


def read_array(name: str, data: bytes, channels: Optional[int] = None) -> np.ndarray:
    """The image file `data` as an array [H, W, C] of the type that it is stored in, in this machine's byte order.

    - `.npy`: [H, W] or [H, W, C] of numbers.
    - TIFF: pages, planes or samples are the channels.
    - anything else: the channels of Pillow's mode (grey 1, RGB 3, RGBA and CMYK 4); palettes become RGB or, with
      transparency, RGBA. An EXIF orientation is applied.

    Args:
        name: for messages.
        channels: how many there have to be; None for any number.

    Raises:
        UnreadableImageError: damaged, no image, another number of channels, too many pixels for Pillow's limit, or
            values that are not finite as float32.
    """
    if not data:
        raise UnreadableImageError(name, "the file is empty (0 bytes)")
    try:
        array = _decode(name, data, channels)
    except (UnreadableImageError, MemoryError):
        raise
    # As with Pillow's: numpy's, OpenCV's and tifffile's errors for damaged files have no narrower common class.
    except Exception as error:
        raise UnreadableImageError(name, reason_of(error)) from error
    _check(name, array, channels)
    return array


def reason_of(error: Exception) -> str:
    """The `reason` of an UnreadableImageError for what a reader raised."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can identify"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"{type(error).__name__}: {error}"


def _decode(name: str, data: bytes, channels: Optional[int]) -> np.ndarray:
    if data.startswith(_NPY_MAGIC):
        array = _read_npy(name, data)
    elif data.startswith(TIFF_MAGICS):
        array = _read_tiff(name, data, channels)
    elif data.startswith(_PNG_MAGIC) and len(data) > 25 and data[24] == 16:
        array = _read_png(name, data)
    else:
        array = _read_with_pillow(data)
    if array.ndim == 2:
        array = array[:, :, None]
    # Byte order and memory layout of a file are nobody else's concern.
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _check(name: str, array: np.ndarray, channels: Optional[int]) -> None:
    if array.dtype.kind not in "uif":
        raise UnreadableImageError(
            name, f"holds values of type {array.dtype}: save them as uint8, uint16, float16, float32 or float64"
        )
    if array.ndim != 3 or 0 in array.shape:
        raise UnreadableImageError(name, f"holds an array {list(array.shape)}, not [height, width, channels]")
    found = array.shape[2]
    if channels is not None and found != channels:
        hint = f"set Data.channels to {found}, or leave such images out"
        if array.shape[0] == channels:
            hint = f"as [height, width, channels] it must be {[*array.shape[1:], channels]}: move the first axis"
        elif channels == 1 and found == 3:
            hint = "make it grey, or set Data.channels to 3"
        raise UnreadableImageError(
            name, f"has {_counted(found)} (an array {list(array.shape)}), and Data.channels is {channels}: {hint}"
        )
    # NaN is the smallest and the largest of all that have one.
    if array.dtype.kind == "f" and not max(-float(array.min()), float(array.max())) <= _LARGEST:
        with np.errstate(over="ignore"):
            broken = np.count_nonzero(~np.isfinite(array.astype(np.float32)))
        what = "too large for float32" if np.isfinite(array).all() else "not finite (NaN or infinite)"
        raise UnreadableImageError(name, f"{broken} of {array.size} values are {what}")


def _counted(channels: int) -> str:
    return f"{channels} channel{'s' * (channels != 1)}"


# --- formats ---


def _read_npy(name: str, data: bytes) -> np.ndarray:
    """No copy, and nothing is executed: object arrays are refused by the check of types."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise UnreadableImageError(name, f"a .npy of version {version}, which images never need: save it again")
    try:
        shape, is_fortran, dtype = read_header(file)
    except MemoryError as error:  # Python's word for an expression that is nested too deeply.
        raise UnreadableImageError(name, "the header of the .npy is no header") from error
    if dtype.hasobject or dtype.kind not in "uif":
        raise UnreadableImageError(
            name, f"holds values of type {dtype}: save them as uint8, uint16, float16, float32 or float64"
        )
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UnreadableImageError(name, f"holds an array {list(shape)}, not [height, width, channels]")
    count, start = math.prod(shape), file.tell()
    if len(data) - start < count * dtype.itemsize:
        raise UnreadableImageError(
            name,
            f"truncated: {list(shape)} of {dtype} needs {count * dtype.itemsize} bytes, {len(data) - start} follow",
        )
    flat = np.frombuffer(data, dtype, count, start)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _read_png(name: str, data: bytes) -> np.ndarray:
    """16 bits: Pillow keeps them of grey images only."""
    import cv2

    with Image.open(io.BytesIO(data)) as image:
        orientation = exif_orientation(image)
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        # Pillow's error says what is wrong with it.
        _read_with_pillow(data)
        raise UnreadableImageError(name, "OpenCV cannot decode it")
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[data[25]]
    return _upright(_reordered(array, samples), orientation)


def _reordered(array: np.ndarray, samples: int) -> np.ndarray:
    """OpenCV's blue, green, red (and alpha) as the `samples` of the file."""
    if array.ndim == 2:
        return array
    order = {1: [0], 2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[samples]
    return array[:, :, [index for index in order if index < array.shape[2]]]


def _read_with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        orientation = exif_orientation(image)
        return _upright(_pillow_array(image), orientation)


def _pillow_array(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode == "1":
        image = image.convert("L")
    elif mode in ("P", "PA"):
        is_transparent = mode == "PA" or "transparency" in image.info or image.palette.mode == "RGBA"
        image = image.convert("RGBA" if is_transparent else "RGB")
    elif mode in ("YCbCr", "HSV"):
        image = image.convert("RGB")
    elif mode == "I" and image.format in ("PNG", "PPM"):
        # 16-bit files, for which Pillow had no other mode.
        return np.asarray(image).astype(np.uint16)
    return np.asarray(image)


def exif_orientation(image: Image.Image) -> int:
    """1 (upright) to 8, by the EXIF standard; 1 if nothing else is said."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1  # A damaged EXIF block says nothing about the pixels.
    return orientation if orientation in range(2, 9) else 1


def _upright(array: np.ndarray, orientation: Any) -> np.ndarray:
    """[H, W, ...] turned as EXIF says."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


# --- TIFF ---


def _read_tiff(name: str, data: bytes, channels: Optional[int]) -> np.ndarray:
    import tifffile

    # It reports on the way what it raises, or gets over, by itself.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        series = _channel_series(file.series)
        _check_tiff_size(name, page, series, len(data))
        if _is_for_pillow(page):
            return _read_with_pillow(data)
        orientation = page.tags.valueof(_ORIENTATION, 1)
        try:
            arrays = [part.asarray() for part in series]
        except ValueError as error:
            if "imagecodecs" not in str(error) and "not supported" not in str(error):
                raise
            array, axes = _read_otherwise(name, data, page, error), "YXS"
        else:
            axes = series[0].axes
            array, axes = (arrays[0], axes) if len(arrays) == 1 else (np.stack(arrays), f"I{axes}")
    return _upright(_channels_last(name, array, axes, channels), orientation)


def _channel_series(found: Sequence[Any]) -> list[Any]:
    """The first of the images that tifffile found in a file. All of them, if they are planes of one size and type: the
    channels, written page by page."""
    first = found[0]
    alike = all((one.axes, one.shape, one.dtype) == ("YX", first.shape, first.dtype) for one in found)
    return list(found) if alike else [first]


def _check_tiff_size(name: str, page: Any, series: Sequence[Any], size: int) -> None:
    """Pillow's rule against decompression bombs, which tifffile does not have."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None:
        return
    count, num_bytes = sum(part.size for part in series), sum(part.nbytes for part in series)
    if page.imagelength * page.imagewidth > 2 * limit or (count > 2 * limit and num_bytes > _MAX_COMPRESSION * size):
        raise UnreadableImageError(
            name,
            f"{count} values of {series[0].dtype} in {size} bytes could be a decompression bomb: more than twice "
            f"PIL.Image.MAX_IMAGE_PIXELS ({limit})",
        )


def _is_for_pillow(page: Any) -> bool:
    """Whether the values are no brightness as they stand: bits, indices into a palette, or inverted."""
    import tifffile

    photometric = tifffile.PHOTOMETRIC
    is_grey = page.samplesperpixel == 1 and page.bitspersample <= 8
    return page.bitspersample < 8 or (is_grey and page.photometric in (photometric.PALETTE, photometric.MINISWHITE))


def _read_otherwise(name: str, data: bytes, page: Any, problem: Exception) -> np.ndarray:
    """A page in a compression that tifffile leaves to imagecodecs, by Pillow or OpenCV where these keep all of it."""
    import cv2

    samples = page.samplesperpixel
    if page.dtype == np.uint8 or samples == 1:
        try:
            array = _pillow_array(Image.open(io.BytesIO(data)))
        except OSError:
            array = None
    else:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
        array = None if array is None else _reordered(array, min(samples, 4))
    shape = (page.imagelength, page.imagewidth, samples)
    if array is None or (array if array.ndim == 3 else array[:, :, None]).shape != shape or array.dtype != page.dtype:
        raise UnreadableImageError(name, f'{problem}: pip install "passl[tiff]"') from problem
    return array if array.ndim == 3 else array[:, :, None]


def _channels_last(name: str, array: np.ndarray, axes: str, channels: Optional[int]) -> np.ndarray:
    """An array with the axes that tifffile found (Y, X and what it may call S, C, Q ...) as [H, W, C]."""
    kept = [i for i, (axis, size) in enumerate(zip(axes, array.shape)) if axis in "YX" or size > 1]
    shape, axes = [array.shape[i] for i in kept], "".join(axes[i] for i in kept)
    array = array.reshape(shape)
    if axes == "YX":
        return array[:, :, None]
    others = [i for i, axis in enumerate(axes) if axis not in "YX"]
    if len(others) != 1 or len(shape) != 3:
        raise UnreadableImageError(
            name,
            f"a stack of images, {shape} with the axes {axes}: save each image as one file, its channels as one axis",
        )
    place = others[0]
    if axes == "QYX" and _is_last_axis_channels(shape, channels):
        return array
    return np.moveaxis(array, place, -1)


def _is_last_axis_channels(shape: list[int], channels: Optional[int]) -> bool:
    """An array of three axes that was saved without a word about them: usually [C, H, W], as its pages are, unless
    only the last one can be the channels."""
    first, _, last = shape
    if channels is not None and channels in (first, last):
        return first != channels
    return last < first
