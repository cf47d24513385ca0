"""The OpenCV back end against recorded operations and against the Pillow back end, and what both accept and refuse."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from passl.data import jpeg
from passl.data import transforms as T
from passl.data.backends import BACKENDS, least_reduction, make_backend, pixels, resampling
from passl.data.image_io import ImageSource, UnreadableImageError
from passl.data.multi_crop import MultiCrop
from passl.data.views import ViewParameters

MAX_LEVELS = 2  # of 255, in single values
MEAN_LEVELS = 0.05
WITH_FACTOR = {
    "brightness": (pixels.adjust_brightness, T.adjust_brightness),
    "contrast": (pixels.adjust_contrast, T.adjust_contrast),
    "saturation": (pixels.adjust_saturation, T.adjust_saturation),
    "hue": (pixels.adjust_hue, T.adjust_hue),
    "blur": (pixels.gaussian_blur, T.gaussian_blur),
}
WITHOUT_FACTOR = {
    "grayscale": (pixels.to_gray, T.grayscale),
    "hflip": (pixels.horizontal_flip, T.horizontal_flip),
    "solarize": (pixels.solarize, T.solarize),
}
UNCHANGED = {"mean": (0.0,) * 3, "std": (1.0 / 255,) * 3}  # normalised values are levels


def picture(height: int, width: int, seed: int = 0, cell: int = 4) -> np.ndarray:
    """Colours from black to white and from grey to saturated, uint8 [height, width, 3]."""
    values = np.random.default_rng(seed).integers(0, 256, (-(-height // cell), -(-width // cell), 3), np.uint8)
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, image_format: str = "JPEG", **options) -> ImageSource:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return ImageSource(f"test.{image_format}", file.getvalue())


def assert_close(ours: np.ndarray, expected: np.ndarray, what: str, most: int = MAX_LEVELS) -> None:
    if ours.ndim < expected.ndim:
        ours = np.repeat(ours[..., None], 3, axis=2)
    assert ours.shape == expected.shape
    difference = np.abs(ours.astype(np.float64) - expected)
    assert difference.max() <= most + 1e-3, f"{what}: {difference.max()} levels"
    assert difference.mean() <= MEAN_LEVELS, f"{what}: {difference.mean()} levels on average"


# --- operations ---


@pytest.mark.smoke
def test_single_operations_are_close_to_the_recorded_ones(reference: Path) -> None:
    recorded = np.load(reference / "aug_ops.npz")
    image = recorded["input"]
    compared = 0
    for key in recorded.files:
        operation, _, parameter = key.partition("/")
        if operation in WITH_FACTOR:
            ours = WITH_FACTOR[operation][0](image, float(parameter))
        elif operation in WITHOUT_FACTOR:
            ours = WITHOUT_FACTOR[operation][0](image)
        elif operation == "resized_crop_bicubic":
            *box, size = map(int, parameter.split("_"))
            ours = resampling.resize(image, tuple(box), (size, size))
        else:
            continue
        assert_close(ours, recorded[key], key)
        compared += 1
    assert compared == len(recorded.files) - 2  # all but `input` and `totensor_normalize`


@pytest.mark.parametrize("operation", WITH_FACTOR)
@pytest.mark.parametrize("cell", [1, 8])
def test_operations_are_close_to_pillow_at_any_factor(operation: str, cell: int) -> None:
    image = picture(60, 75, seed=1, cell=cell)
    ours, reference = WITH_FACTOR[operation]
    low, high = {"hue": (-0.5, 0.5), "blur": (0.1, 3.0)}.get(operation, (0.0, 2.0))
    for factor in np.linspace(low, high, 21).tolist():
        expected = np.asarray(reference(Image.fromarray(image), factor))
        difference = np.abs(ours(image, factor).astype(int) - expected)
        assert difference.max() <= MAX_LEVELS, factor
        assert difference.mean() <= 0.2, factor


def test_gray_images_of_one_channel_are_as_those_of_three() -> None:
    gray = picture(20, 30)[..., 0].copy()
    three = np.repeat(gray[..., None], 3, axis=2)
    for operation, (ours, _) in WITH_FACTOR.items():
        factor = {"hue": 0.1, "blur": 1.3}.get(operation, 1.2)
        assert_close(ours(gray, factor), ours(three, factor), operation, most=1)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 90, 120), (32, 32)),
        ((7, 11, 60, 21), (24, 30)),
        ((30, 20, 10, 12), (40, 28)),
        ((5, 5, 60, 32), (20, 32)),
    ],
)
@pytest.mark.parametrize("library", ["cykooz", "pillow"])
def test_resizing_is_close_to_pillow_and_keeps_to_the_box(box, size, library: str, monkeypatch) -> None:
    if library == "cykooz":
        pytest.importorskip("cykooz_resizer")
    else:
        monkeypatch.setattr(resampling, "cykooz_resizer", None)
    image = picture(90, 120, seed=2)
    expected = np.asarray(T.resized_crop(Image.fromarray(image), T.Box(*box), size, "bicubic"))
    assert_close(resampling.resize(image, box, size), expected, library)
    outside = np.zeros_like(image)
    top, left, height, width = box
    outside[top : top + height, left : left + width] = image[top : top + height, left : left + width]
    np.testing.assert_array_equal(resampling.resize(outside, box, size), resampling.resize(image, box, size))


# --- whole views ---


@pytest.mark.smoke
def test_both_back_ends_show_the_same_views() -> None:
    source = encoded(Image.fromarray(picture(180, 240, cell=12)), quality=90)
    arguments = {"global_crops_size": 64, "local_crops_size": 32, "num_local_crops": 4, **UNCHANGED}
    differences = []
    for seed in range(8):
        ours, expected = (MultiCrop(backend=b, **arguments)(source, np.random.default_rng(seed)) for b in BACKENDS)
        assert ours.keys() == expected.keys()
        differences += [np.abs(ours[name] - expected[name]).ravel() for name in ours]
    differences = np.concatenate(differences)
    assert differences.mean() <= 0.1
    # Rounding adds up over the operations, and solarising makes large differences of small ones.
    assert np.quantile(differences, 0.99) <= 1.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_normalised_as_in_the_recording(backend: str, reference: Path) -> None:
    recorded = np.load(reference / "aug_ops.npz")
    image = recorded["input"]
    height, width = image.shape[:2]
    opened = make_backend(backend, T.IMAGENET_MEAN, T.IMAGENET_STD).open(image)
    opened.decode()
    out = np.empty((3, height, width), np.float32)
    opened.render(ViewParameters(T.Box(0, 0, height, width), False, (), False, None, False), (height, width), out)
    np.testing.assert_allclose(out, recorded["totensor_normalize"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_and_decoded_images_give_the_same_views(backend: str) -> None:
    image = Image.fromarray(picture(50, 70))
    multi_crop = MultiCrop(24, 16, num_local_crops=2, backend=pickle.loads(pickle.dumps(backend)))
    multi_crop = pickle.loads(pickle.dumps(multi_crop))
    inputs = [image, np.asarray(image), encoded(image, "PNG")]
    views = [multi_crop(given, np.random.default_rng(0)) for given in inputs]
    for name in views[0]:
        assert len({v[name].tobytes() for v in views}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_of_other_kinds_are_errors(backend: str) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], not float32 \[9, 9, 3\]"):
        make_backend(backend, **UNCHANGED).open(np.zeros((9, 9, 3), np.float32))


def test_one_thread_and_no_opencv_before_it_is_needed() -> None:
    cv2.setNumThreads(2)
    MultiCrop(8, num_local_crops=0)(picture(9, 9), np.random.default_rng(0))
    assert cv2.getNumThreads() == 1
    code = "import sys, passl.data, passl.data.multi_crop; assert 'cv2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_resizer_is_told_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(resampling, "cykooz_resizer", None)
    monkeypatch.setattr(resampling, "_warned", [])
    with caplog.at_level("WARNING", logger="passl"):
        MultiCrop()
        MultiCrop()
    assert [record.getMessage() for record in caplog.records] == [resampling.SLOW]


# --- files ---


def kinds_of_files() -> dict[str, ImageSource]:
    image = Image.fromarray(picture(40, 60))
    turned = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned[f"orientation {orientation}"] = encoded(image, exif=exif)
    return {
        **turned,
        "grey JPEG": encoded(image.convert("L")),
        "CMYK JPEG": encoded(image.convert("CMYK")),
        "progressive JPEG": encoded(image, progressive=True),
        "JPEG without chroma subsampling": encoded(image, subsampling=0),
        "palette GIF": encoded(image.convert("P"), "GIF"),
        "RGBA PNG": encoded(image.convert("RGBA"), "PNG"),
        "1x1": encoded(image.resize((1, 1))),
        "1x500": encoded(image.resize((1, 500))),
    }


@pytest.mark.parametrize("kind", kinds_of_files())
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_all_kinds_of_files_are_decoded_as_by_pillow(kind: str, decoder: str, monkeypatch) -> None:
    if decoder == "pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    source = kinds_of_files()[kind]
    plain = jpeg.plain_jpeg(source)
    expected = np.asarray(source.rgb())
    if plain is None:
        assert kind in ("CMYK JPEG", "palette GIF", "RGBA PNG")
    else:
        assert (plain.height, plain.width) == expected.shape[:2]
        np.testing.assert_array_equal(plain.decode()[..., :3], expected)
    opened = make_backend("opencv", **UNCHANGED).open(source)
    assert (opened.height, opened.width) == expected.shape[:2]


def test_damaged_files_are_the_same_error_or_the_same_image() -> None:
    rng = np.random.default_rng(0)
    good = encoded(Image.fromarray(picture(40, 60))).data
    outcomes = set()
    for number in range(150):
        data = bytearray(good)
        place = int(rng.integers(2, len(data)))
        if number % 3 == 0:
            del data[place:]
        elif number % 3 == 1:
            data[place] = int(rng.integers(256))
        else:
            del data[place : place + 5]
        ours, expected = (_outcome(backend, ImageSource("damaged.jpg", bytes(data))) for backend in BACKENDS)
        assert type(ours) is type(expected)
        if isinstance(ours, str):
            # Pillow names an object by its address when it cannot identify it.
            assert ours == expected
        else:
            assert np.abs(ours - expected).max() <= MAX_LEVELS + 1e-3
        outcomes.add(type(ours))
    assert outcomes == {str, np.ndarray}


def _outcome(backend: str, source: ImageSource):
    multi_crop = MultiCrop(
        global_crops_size=[40, 60],
        global_crops_scale=(1.0, 1.0),
        ratio=(1.5, 1.5),
        num_local_crops=0,
        flip_prob=0.0,
        jitter_prob=0.0,
        gray_prob=0.0,
        global_blur_probs=(0.0, 0.0),
        global_solarize_probs=(0.0, 0.0),
        backend=backend,
        **UNCHANGED,
    )
    try:
        return multi_crop(source, np.random.default_rng(0))["global_crops"][0]
    except UnreadableImageError as error:
        return str(error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decompression_bomb_is_an_error_before_it_is_decoded(backend: str, monkeypatch) -> None:
    source = encoded(Image.fromarray(picture(40, 60)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="DecompressionBombError"):
        make_backend(backend, **UNCHANGED).open(source)


# --- reduced decoding ---


@pytest.mark.parametrize(("orientation", "shape"), [(1, (601, 811)), (6, (602, 812)), (3, (601, 811))])
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_views_of_a_reduced_image_hardly_differ(orientation: int, shape, decoder: str, monkeypatch) -> None:
    if decoder == "pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = np.clip(0.8 * picture(*shape, cell=60) + 0.2 * picture(*shape, cell=3), 0, 255).astype(np.uint8)
    source = encoded(Image.fromarray(image), quality=92, exif=exif)
    upright = source.rgb()
    rng = np.random.default_rng(0)
    for _ in range(5):
        height, width = int(rng.integers(300, upright.height)), int(rng.integers(300, upright.width))
        top, left = int(rng.integers(upright.height - height)), int(rng.integers(upright.width - width))
        view = ViewParameters(T.Box(top, left, height, width), True, (), False, None, False)
        size = (height // 7, width // 7)
        rendered = []
        for reduction in (1.0, least_reduction([(view, size)])):
            opened = make_backend("opencv", **UNCHANGED).open(source)
            opened.decode(reduction)
            rendered.append(np.empty((3, *size), np.float32))
            opened.render(view, size, rendered[-1])
        assert opened.scale == (1 if orientation == 3 else 2)  # odd sides cannot be turned
        full, reduced = rendered
        assert np.abs(full - reduced).mean() <= 0.8
        assert abs(np.log10(_energy(reduced) / _energy(full))) <= 0.02
        assert np.abs(full.mean(axis=(1, 2)) - reduced.mean(axis=(1, 2))).max() <= 0.1


def _energy(image: np.ndarray) -> float:
    return float(np.mean(np.diff(image, axis=1) ** 2) + np.mean(np.diff(image, axis=2) ** 2))


def test_the_least_reduction_is_that_of_the_smallest_box() -> None:
    def view(height: int, width: int) -> ViewParameters:
        return ViewParameters(T.Box(0, 0, height, width), False, (), False, None, False)

    assert least_reduction([(view(80, 60), (10, 10)), (view(90, 40), (20, 5))]) == 4.5
