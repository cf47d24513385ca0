"""Transforms against the recorded single operations, torchvision's rules, and their own promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from passl.data import transforms as T
from passl.data.image_io import read_rgb
from passl.registry import TRANSFORMS

WITH_FACTOR = {
    "brightness": T.adjust_brightness,
    "contrast": T.adjust_contrast,
    "saturation": T.adjust_saturation,
    "hue": T.adjust_hue,
    "blur": T.gaussian_blur,
}
WITHOUT_FACTOR = {"grayscale": T.grayscale, "hflip": T.horizontal_flip, "solarize": T.solarize}


@pytest.fixture(scope="module")
def tolerance(reference: Path) -> int:
    """Levels out of 255: none with the recordings' Pillow; Pillow 13 changed the order of the resampling passes."""
    recorded = json.loads((reference / "aug_stats.json").read_text())["versions"]["pillow"]
    same = (int(PIL.__version__.split(".")[0]) < 13) == (int(recorded.split(".")[0]) < 13)
    return 0 if same else 2


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def assert_levels(ours: np.ndarray, recorded: np.ndarray, tolerance: int, what: str) -> None:
    assert ours.shape == recorded.shape
    assert np.abs(ours.astype(int) - recorded).max() <= tolerance, what


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.smoke
def test_single_operations_are_exact(reference: Path, tolerance: int) -> None:
    recorded = np.load(reference / "aug_ops.npz")
    image = Image.fromarray(recorded["input"])
    compared = 0
    for key in recorded.files:
        operation, _, parameter = key.partition("/")
        if operation in WITH_FACTOR:
            ours = WITH_FACTOR[operation](image, float(parameter))
        elif operation in WITHOUT_FACTOR:
            ours = WITHOUT_FACTOR[operation](image)
        elif operation == "resized_crop_bicubic":
            *box, size = map(int, parameter.split("_"))
            ours = T.resized_crop(image, T.Box(*box), size, "bicubic")
        else:
            continue
        levels = tolerance if operation.startswith("resized_crop") else 0
        assert_levels(np.asarray(ours), recorded[key], levels, key)
        compared += 1
    assert compared == len(recorded.files) - 2  # all but `input` and `totensor_normalize`
    array = T.Normalize()(T.ToTensor()(image))
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    np.testing.assert_allclose(array, recorded["totensor_normalize"], rtol=0, atol=1e-6)


@pytest.mark.smoke
def test_evaluation_pipeline_is_exact(reference: Path, tolerance: int) -> None:
    recorded = np.load(reference / "knn_pipeline.npz")
    resize_and_crop = T.Compose([T.Resize(256, interpolation="bicubic"), T.CenterCrop(224)])
    to_array = T.Compose([T.ToTensor(), T.Normalize()])
    for key in [key for key in recorded.files if key.startswith("val_resized_u8/")]:
        number = key.split("/")[1]
        path = reference / "knn_images" / recorded["val_files"][int(number)]
        image = resize_and_crop(read_rgb(path))
        assert_levels(np.asarray(image), recorded[key], tolerance, str(path))
        if tolerance:
            continue
        array = to_array(image)
        corner = recorded[f"val_tensor_corner/{number}"]
        np.testing.assert_allclose(array[:, : corner.shape[1], : corner.shape[2]], corner, rtol=0, atol=1e-6)
        statistics = np.stack([array.mean(axis=(1, 2)), array.std(axis=(1, 2))])
        expected = recorded[f"val_tensor_mean_std/{number}"]
        expected = expected if expected.shape == statistics.shape else expected.T
        np.testing.assert_allclose(statistics, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "expected"),
    # An int is the shorter side, and the longer one is truncated: 100 * 61 / 40 = 152.5.
    [(100, (152, 100)), ([30, 50], (50, 30)), ((7, 9), (9, 7))],
)
def test_resize_sizes(size, expected: tuple[int, int]) -> None:
    assert T.Resize(size)(picture(40, 60).resize((61, 40))).size == expected


def test_resize_of_an_upright_image_keeps_the_width_as_the_shorter_side() -> None:
    assert T.Resize(20)(picture(61, 40)).size == (20, int(20 * 60 / 40))


def test_center_crop_pads_small_images_with_black() -> None:
    cropped = np.asarray(T.CenterCrop([9, 4])(Image.new("RGB", (6, 6), (200, 200, 200))))
    assert cropped.shape == (9, 4, 3)
    assert [row for row in range(9) if cropped[row].any()] == [1, 2, 3, 4, 5, 6]


def test_random_transforms_repeat_with_the_same_generator_and_vary_without() -> None:
    image = picture()
    for transform in (
        T.RandomResizedCrop([20, 30]),
        T.ColorJitter(),
        T.Compose([T.RandomHorizontalFlip(), T.GaussianBlur(prob=1.0)]),
    ):
        assert transform(image, generator(3)) == transform(image, generator(3))
        assert transform(image, generator(3)) != transform(image, generator(4))


@pytest.mark.parametrize(
    ("make", "function"),
    [
        (lambda prob: T.RandomHorizontalFlip(prob), T.horizontal_flip),
        (lambda prob: T.RandomGrayscale(prob), T.grayscale),
        (lambda prob: T.Solarize(prob), T.solarize),
        (lambda prob: T.GaussianBlur(prob, radius=(1.5, 1.5)), lambda image: T.gaussian_blur(image, 1.5)),
    ],
)
def test_probability_zero_is_never_and_one_is_always(make, function) -> None:
    image = picture()
    for seed in range(20):
        assert make(0.0)(image, generator(seed)) == image
        assert make(1.0)(image, generator(seed)) == function(image)


def test_color_jitter_leaves_out_operations_of_strength_zero() -> None:
    for seed in range(10):
        names = [name for name, _ in T.draw_color_jitter(generator(seed), 0.4, 0.0, 0.0, 0.1)]
        assert sorted(names) == ["brightness", "hue"]
    assert T.ColorJitter(0, 0, 0, 0)(picture(), generator()) == picture()
    assert T.ColorJitter(prob=0.0)(picture(), generator()) == picture()


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (2, 3)])
def test_crop_boxes_fit_into_extreme_images(height: int, width: int) -> None:
    for seed in range(30):
        box = T.draw_crop_box(generator(seed), height, width, (0.4, 1.0), (3 / 4, 4 / 3))
        assert box.height > 0
        assert box.width > 0
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width


def test_a_box_that_cannot_fit_becomes_the_largest_central_one() -> None:
    box = T.draw_crop_box(generator(), 100, 1000, (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == T.Box(top=0, left=433, height=100, width=133)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.Resize(0), "size must be a positive int or [height, width], not 0"),
        (lambda: T.CenterCrop([3]), "size must be a positive int or [height, width], not [3]"),
        (lambda: T.Resize(8, interpolation="cubic"), "interpolation must be one of nearest, bilinear, bicubic"),
        (lambda: T.RandomResizedCrop(8, scale=(0.5, 1.5)), "scale must be [low, high] with 0 < low <= high <= 1.0"),
        (lambda: T.RandomResizedCrop(8, ratio=(2, 1)), "ratio must be [low, high] with 0 < low <= high, not [2, 1]"),
        (lambda: T.RandomHorizontalFlip(1.5), "prob must be a probability between 0 and 1, not 1.5"),
        (lambda: T.ColorJitter(hue=0.6), "hue must be between 0 and 0.5, not 0.6"),
        (lambda: T.ColorJitter(contrast=-1), "contrast must be at least 0, not -1"),
        (lambda: T.Normalize(mean=[0.5], std=[0.0]), "std above 0"),
    ],
)
def test_bad_arguments_are_errors(make, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_all_transforms_are_registered() -> None:
    expected = {"CenterCrop", "ColorJitter", "GaussianBlur", "MultiCrop", "Normalize", "RandomGrayscale"}
    expected |= {"RandomHorizontalFlip", "RandomResizedCrop", "Resize", "Solarize", "ToTensor"}
    assert expected <= set(TRANSFORMS.names())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(1, 3000), (7, 2500), (3000, 1), (1711, 5)])
def test_middle_of_a_long_image_is_that_of_two_steps(shape: tuple[int, int], interpolation: str) -> None:
    rng = np.random.default_rng(sum(shape))
    values = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    for size, crop_size in ((32, 28), (20, 9), (11, [4, 34])):
        both = [T.Resize(size, interpolation), T.CenterCrop(crop_size)]
        for image, unit in ((Image.fromarray(values), 1), (values.astype(np.float32) / 255, 1e-5)):
            expected = np.asarray(both[1](both[0](image)), np.float64)
            result = np.asarray(T.Compose(both)(image), np.float64)
            assert result.shape == expected.shape
            assert np.abs(result - expected).max() <= unit
            assert np.mean(np.abs(result - expected)) < unit / 20  # halves may be rounded otherwise


def test_middle_of_a_long_image_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args: sizes.append(args[1]) or original(*args))
    assert T.Compose([T.Resize(256, "bicubic"), T.CenterCrop(224)])(Image.new("RGB", (5000, 1))).size == (224, 224)
    assert max(map(max, sizes)) <= 256


@pytest.mark.parametrize("ratio", [(3.0, 4.0), (0.1, 0.2)])
def test_boxes_are_never_empty(ratio: tuple[float, float]) -> None:
    for height, width in ((1, 1), (1, 9), (9, 1), (2, 2)):
        box = T.draw_crop_box(np.random.default_rng(0), height, width, (0.9, 1.0), ratio)
        assert 1 <= box.height <= height
        assert 1 <= box.width <= width
