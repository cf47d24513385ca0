"""Reading every kind of image file as RGB, and naming what is wrong with the others."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.data.image_io import UnreadableImageError, image_extensions, read_rgb, reduce_to_8_bit

COLORS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def rgb_array(path: Path) -> np.ndarray:
    image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bit_modes_convert_as_the_official_code_does(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLORS).convert(mode)
    if mode.endswith("A"):
        image.putalpha(100)
    path = tmp_path / "image.tif"
    image.save(path)
    np.testing.assert_array_equal(rgb_array(path), np.asarray(Image.open(path).convert("RGB")))


def test_palette_with_transparency_keeps_its_colors_without_a_warning(tmp_path: Path) -> None:
    palette = Image.fromarray(COLORS).quantize(16)
    path = tmp_path / "palette.png"
    palette.save(path, transparency=bytes(range(0, 160, 10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = rgb_array(path)
    np.testing.assert_array_equal(pixels, np.asarray(palette.convert("RGB")))


def test_transparency_is_dropped_not_blended(tmp_path: Path) -> None:
    path = tmp_path / "transparent.png"
    Image.fromarray(np.dstack([COLORS, np.zeros((12, 10), np.uint8)])).save(path)
    np.testing.assert_array_equal(rgb_array(path), COLORS)


@pytest.mark.smoke
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 120).astype(np.uint16).reshape(12, 10)
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(values).save(path)
    # Older Pillow opens such PNGs as 32-bit integers, which rounds instead.
    np.testing.assert_allclose(rgb_array(path)[..., 0], values // 256, rtol=0, atol=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-10, 0, 10]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-0.1, 0.0, 0.1]], np.float64), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[1000.0, 1e6, 2e6]], np.float32), [0, 127, 255]),
        (np.array([[0.0, np.nan, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[-np.inf, 0.5, np.inf]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.nan]], np.float32), [0, 0]),
        (np.array([[-3.0, -3.0]], np.float32), [0, 0]),
    ],
)
def test_reduction_to_eight_bit(values: np.ndarray, expected: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(reduce_to_8_bit(values), [expected])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "rotated.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLORS).save(path, exif=exif)
    turned = {
        1: COLORS,
        2: COLORS[:, ::-1],
        3: COLORS[::-1, ::-1],
        4: COLORS[::-1],
        5: COLORS.transpose(1, 0, 2),
        6: COLORS[::-1].transpose(1, 0, 2),
        7: COLORS[::-1, ::-1].transpose(1, 0, 2),
        8: COLORS[:, ::-1].transpose(1, 0, 2),
    }
    np.testing.assert_array_equal(rgb_array(path), turned[orientation])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*", b""])
def test_a_damaged_exif_block_does_not_make_the_image_unreadable(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "damaged_exif.jpg"
    Image.fromarray(COLORS).save(path, exif=exif)
    assert rgb_array(path).shape == COLORS.shape


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    path = tmp_path / "animation.gif"
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert (rgb_array(path) == [255, 0, 0]).all()


def test_unicode_and_spaces_in_names(tmp_path: Path) -> None:
    path = tmp_path / "ein Bild, 图像 é.png"
    Image.fromarray(COLORS).save(path)
    np.testing.assert_array_equal(rgb_array(path), COLORS)


def _truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-3000])


def _damaged(path: Path) -> None:
    Image.fromarray(COLORS).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(bytes(content))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.touch(), "the file is empty (0 bytes)"),
        (lambda path: path.write_text("no image"), "not an image that Pillow can identify"),
        (lambda path: path.mkdir(), "IsADirectoryError"),
        (_truncated, "runcated"),
        (_damaged, "Error"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path: Path, make, reason: str) -> None:
    path = tmp_path / "broken.jpg"
    make(path)
    with pytest.raises(UnreadableImageError) as error:
        read_rgb(path)
    assert error.value.path == str(path)
    assert reason in error.value.reason
    assert str(path) in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="DecompressionBombError.*10000 pixels"):
        read_rgb(path)


def test_extensions_include_the_official_ones_and_no_stub_formats() -> None:
    official = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    assert official <= image_extensions()
    assert not image_extensions() & {".h5", ".mpg", ".pdf", ".txt", ".json"}
