"""passl.data.raw_images and ImageSource.image: images as they are stored."""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from passl.data.image_io import ImageSource, UnreadableImageError, image_extensions
from passl.data.raw_images import is_eight_bit, read_array, unit_floats

TYPES = (np.uint8, np.uint16, np.float16, np.float32, np.float64)


def values(channels: int, dtype: type = np.uint16, height: int = 6, width: int = 9) -> np.ndarray:
    return (np.random.default_rng(channels).random((height, width, channels)) * 250).astype(dtype)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def pillow(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def opencv(suffix: str, array: np.ndarray) -> bytes:
    """`array` is in RGB order."""
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[array.shape[2]]
    return cv2.imencode(suffix, array[:, :, order])[1].tobytes()


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_arrays_and_tiffs_come_back_exactly(channels, dtype):
    array = values(channels, dtype)
    files = {"npy": npy(array), "big-endian": npy(array.astype(array.dtype.newbyteorder(">")))}
    files["fortran"] = npy(np.asfortranarray(array))
    if channels > 1:
        files["contiguous"] = tiff(array, photometric="minisblack", planarconfig="contig")
        files["deflate"] = tiff(array, photometric="minisblack", planarconfig="contig", compression="zlib")
        files["big"] = tiff(array, photometric="minisblack", planarconfig="contig", bigtiff=True)
        files["planes"] = tiff(np.moveaxis(array, 2, 0), photometric="minisblack", planarconfig="separate")
        files["pages"] = tiff(np.moveaxis(array, 2, 0), photometric="minisblack")
        files["named"] = tiff(np.moveaxis(array, 2, 0), photometric="minisblack", metadata={"axes": "CYX"})
    files["as it comes"] = tiff(array, **({"photometric": "rgb"} if channels in (3, 4) else {}))
    for name, data in files.items():
        found = read_array(name, data, channels)
        assert found.dtype == array.dtype, name
        assert found.dtype.isnative, name
        np.testing.assert_array_equal(found, array, name)


def test_grey_arrays_have_one_channel():
    array = values(1)[:, :, 0]
    for data in (npy(array), tiff(array), opencv(".png", array[:, :, None])):
        np.testing.assert_array_equal(read_array("grey", data, 1), array[:, :, None])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_of_16_bits(channels):
    array = values(channels) * 257
    found = read_array("a.png", opencv(".png", array))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint8, 3), (np.uint16, 3), (np.float32, 3)])
def test_tiff_in_a_compression_that_only_other_libraries_read(dtype, channels):
    array = values(channels, dtype)
    ok, data = cv2.imencode(
        ".tiff", array[:, :, ::-1].squeeze(), [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW]
    )
    assert ok
    np.testing.assert_array_equal(read_array("lzw.tif", data.tobytes(), channels), array)


@pytest.mark.parametrize(
    ("mode", "channels", "image_format"),
    [
        ("1", 1, "PNG"),
        ("L", 1, "PNG"),
        ("L", 1, "JPEG"),
        ("LA", 2, "PNG"),
        ("P", 3, "PNG"),
        ("P", 3, "TIFF"),
        ("RGB", 3, "JPEG"),
        ("RGB", 3, "TIFF"),
        ("RGBA", 4, "PNG"),
        ("RGBA", 4, "TIFF"),
        ("CMYK", 4, "TIFF"),
        ("I;16", 1, "PNG"),
        ("I;16", 1, "TIFF"),
        ("F", 1, "TIFF"),
    ],
)
def test_pillows_modes(mode, channels, image_format):
    picture = Image.fromarray(values(3, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(values(1)[:, :, 0])
    elif mode == "F":
        image = picture.convert("L").convert("F")
    else:
        image = picture.convert(mode)
    data = pillow(image, image_format)
    array = read_array("picture", data, channels)
    assert array.shape == (6, 9, channels)
    if image_format != "JPEG":
        expected = image.convert({"1": "L", "P": "RGB"}.get(mode, mode))
        np.testing.assert_array_equal(array.squeeze(), np.asarray(expected).squeeze())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_applied_as_to_rgb(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = pillow(Image.fromarray(values(3, np.uint8)), exif=exif)
    np.testing.assert_array_equal(read_array("a.png", data), np.asarray(ImageSource("a.png", data).rgb()))
    tagged = tiff(
        values(4), photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, orientation, True)]
    )
    swapped = orientation >= 5
    assert read_array("a.tif", tagged).shape == ((9, 6, 4) if swapped else (6, 9, 4))


@pytest.mark.smoke
def test_the_scale_of_each_type():
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535)):
        found = unit_floats(np.array([[[0], [white]]], dtype))
        assert found.dtype == np.float32
        assert found.ravel().tolist() == [0.0, 1.0]
    for dtype in (np.float16, np.float64, np.int16):
        assert unit_floats(np.array([[[-300], [7]]], dtype)).ravel().tolist() == [-300.0, 7.0]


@pytest.mark.parametrize(
    ("data", "channels", "reason"),
    [
        (npy(values(5)), 4, "has 5 channels (an array [6, 9, 5]), and Data.channels is 4: set Data.channels to 5, or"),
        (npy(values(1)), 2, "has 1 channel (an array [6, 9, 1]), and Data.channels is 2"),
        (npy(values(9, height=4, width=6)), 4, "must be [6, 9, 4]: move the first axis"),
        (pillow(Image.new("RGB", (4, 4))), 1, "make it grey, or set Data.channels to 3"),
        (npy(np.full((2, 3, 2), np.nan)), 2, "12 of 12 values are not finite (NaN or infinite)"),
        (npy(np.array([[1.0, np.inf]], np.float32)), 1, "1 of 2 values are not finite"),
        (npy(np.zeros((3, 3), complex)), 1, "holds values of type complex128: save them as uint8, uint16, float16"),
        (npy(np.zeros((2, 3, 4, 5))), 5, "holds an array [2, 3, 4, 5], not [height, width, channels]"),
        (npy(np.zeros(7)), 1, "holds an array [7], not [height, width, channels]"),
        (npy(np.zeros((0, 3, 1))), 1, "holds an array [0, 3, 1], not [height, width, channels]"),
        (npy(values(5))[:-1], 5, "truncated: [6, 9, 5] of uint16 needs 540 bytes, 539 follow"),
        (npy(values(5))[:40], 5, "Error"),
        (tiff(values(4))[:300], 4, "Error"),
        (tiff(values(3)[None, None].repeat(2, 0).repeat(3, 1)), 3, "a stack of images"),
        (b"", 2, "the file is empty (0 bytes)"),
        (b"no image", 2, "not an image that Pillow can identify"),
        (opencv(".png", values(3))[:60], 3, "Error"),
    ],
)
def test_what_cannot_be_read_says_why(data, channels, reason):
    with pytest.raises(UnreadableImageError) as caught:
        read_array("a/b", data, channels)
    assert reason in caught.value.reason
    assert caught.value.path == "a/b"


def test_nothing_in_a_file_is_executed():
    file = io.BytesIO()
    np.save(file, np.array([[print]], object), allow_pickle=True)
    with pytest.raises(UnreadableImageError, match="holds values of type object"):
        read_array("pickle.npy", file.getvalue())


def npy_file(header, body):
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 5, 2)}", bytes(400)),
            r"an array \[-1, 5, 2\]",
        ),
        (npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999, 9999999)}", bytes(4)), "truncated"),
        (npy_file("-" * 9000 + "1", bytes(400)), "the header of the .npy is no header|RecursionError"),
    ],
)
def test_hostile_headers_of_arrays(data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        read_array("hostile.npy", data)


def test_values_that_float32_cannot_hold():
    file = io.BytesIO()
    np.save(file, np.array([[1e300, -1e300, 1.0]]))
    with pytest.raises(UnreadableImageError, match="2 of 3 values are too large for float32"):
        read_array("large.npy", file.getvalue())


def test_pages_written_one_by_one_are_the_channels():
    planes = values(5).transpose(2, 0, 1)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for plane in planes:
            writer.write(plane, photometric="minisblack")
    np.testing.assert_array_equal(read_array("pages.tif", file.getvalue()), planes.transpose(1, 2, 0))


def test_decompression_bombs_are_refused(monkeypatch):
    data = tiff(np.zeros((300, 300, 5), np.uint8), photometric="minisblack", planarconfig="contig", compression="zlib")
    assert read_array("zeros.tif", data).shape == (300, 300, 5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="could be a decompression bomb"):
        read_array("zeros.tif", data)


@pytest.mark.smoke
def test_what_transforms_get():
    jpeg, grey = pillow(Image.new("RGB", (5, 4)), "JPEG"), pillow(Image.new("L", (5, 4)))
    deep, four = opencv(".png", values(3)), tiff(values(4, np.uint8))
    for data in (jpeg, grey, deep, four):
        assert isinstance(ImageSource("a", data).image(), Image.Image)
    # Three channels: 8-bit pictures of any mode are RGB, as always; what has more bits keeps them.
    for data in (jpeg, grey):
        assert ImageSource("a", data, 3).image().mode == "RGB"
    assert ImageSource("a", deep, 3).image().dtype == np.uint16
    assert ImageSource("a", tiff(values(3, np.float32), photometric="rgb"), 3).image().dtype == np.float32
    assert ImageSource("a", tiff(values(3, np.uint8)), 3).image().mode == "RGB"
    assert ImageSource("a", grey, 1).image().shape == (4, 5, 1)
    assert ImageSource("a", four, 4).image().shape == (6, 9, 4)
    with pytest.raises(UnreadableImageError, match="Data.channels=3"):
        ImageSource("a.npy", npy(values(3))).rgb()
    assert ".npy" in image_extensions(4)
    assert ".npy" not in image_extensions()


def test_eight_bits_are_told_from_the_header():
    for data in (pillow(Image.new("RGB", (5, 4)), "JPEG"), pillow(Image.new("P", (5, 4)), "GIF"), b"", b"nothing"):
        assert is_eight_bit(data)
    for data in (npy(values(3)), opencv(".png", values(1)), tiff(values(3)), tiff(values(5, np.float32))):
        assert not is_eight_bit(data)


def test_reading_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_array("a", npy(values(5)))
        read_array("a", tiff(values(5)))


def test_a_tiff_of_other_channels_says_what_to_set():
    data = tiff(values(2), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImageError, match=r"no mode for: say what it is in .* Data\.channels=3"):
        ImageSource("two.tif", data).rgb()
