"""BatchMultiCrop: the views of MultiCrop, of a whole batch at once."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.data.arrays import blur_planes
from passl.data.backends.pixels import box_kernel
from passl.data.banded import box_blur_band, gaussian_band, resize_band
from passl.data.batch_views import BatchMultiCrop
from passl.data.multi_crop import MultiCrop

LEVELS = {"mean": [0.0] * 3, "std": [1 / 255] * 3}
SIZES = {"global_crops_size": 32, "local_crops_size": [16, 24], "num_local_crops": 3}
PLAIN = {
    "jitter_prob": 0.0,
    "gray_prob": 0.0,
    "global_blur_probs": [0.0, 0.0],
    "local_blur_prob": 0.0,
    "global_solarize_probs": [0.0, 0.0],
}


def pictures(number: int = 12, height: int = 60, width: int = 80) -> np.ndarray:
    """uint8 [number, height, width, 3], smooth"""
    small = np.random.default_rng(height).integers(0, 256, (number, 10, 10, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in small]
    )


def tensor(images: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def one_by_one(images: np.ndarray, arguments: dict) -> dict[str, np.ndarray]:
    """The views of MultiCrop, view by view"""
    transform, rng = MultiCrop(**{"backend": "pillow", **arguments}), np.random.default_rng(5)
    views = [transform(image, rng) for image in images]
    stacked = {name: np.stack([those[name] for those in views], 1) for name in views[0]}
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in stacked.items()}


def assert_alike(images: np.ndarray, arguments: dict, largest: float, mean: float) -> None:
    expected = one_by_one(images, arguments)
    found = BatchMultiCrop(**arguments)(tensor(images), np.random.default_rng(5))
    assert list(found) == list(expected)
    for name, views in found.items():
        assert views.dtype == paddle.float32
        assert views.stop_gradient
        assert tuple(views.shape) == expected[name].shape
        difference = np.abs(views.numpy() - expected[name])
        assert difference.max() < largest
        assert difference.mean() < mean


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("changes", "largest", "mean"),
    [
        ({}, 2, 0.4),
        ({"global_blur_probs": [1.0, 0.5], "local_blur_prob": 0.5}, 5, 0.7),
        ({"global_solarize_probs": [1.0, 0.5]}, 2, 0.4),
        ({"gray_prob": 0.5}, 2, 0.4),
        ({"jitter_prob": 1.0, "contrast": 0, "saturation": 0, "hue": 0}, 4, 0.8),
        ({"jitter_prob": 1.0, "brightness": 0, "saturation": 0, "hue": 0}, 4, 0.8),
        ({"jitter_prob": 1.0, "brightness": 0, "contrast": 0, "hue": 0}, 4, 0.8),
        ({"jitter_prob": 1.0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0.5}, 16, 1.2),
        ({"jitter_prob": 0.8}, 25, 2.0),
    ],
)
def test_each_operation_is_that_of_pillow_up_to_rounding(changes, largest, mean):
    assert_alike(pictures(), {**SIZES, **PLAIN, **LEVELS, **changes}, largest, mean)


@pytest.mark.parametrize(
    ("height", "width"),
    [(60, 80), (97, 41), (32, 32), (9, 7), (1, 5)],  # also smaller than the crops
)
def test_the_whole_recipe(height, width):
    assert_alike(pictures(20, height, width), {**SIZES, **LEVELS}, 25, 2.0)


def test_normalised_and_without_local_crops():
    arguments = {**PLAIN, "global_crops_size": [20, 28], "num_local_crops": 0}
    assert_alike(pictures(2), arguments, 0.04, 0.01)
    assert list(BatchMultiCrop(**arguments)(tensor(pictures(2)), np.random.default_rng(0))) == ["global_crops"]


@pytest.mark.parametrize(("channels", "is_kept"), [(1, True), (4, False)])
def test_other_channels_are_those_of_raw_images(channels, is_kept):
    """Boxes, flips, blurs; brightness and contrast of one channel, and no limits to the values."""
    images = pictures()[..., :1].astype(np.float32) / 200 + np.arange(channels, dtype=np.float32)
    arguments = {**SIZES, "mean": [0.5] * channels, "std": [0.25] * channels}
    assert_alike(images, arguments, 1e-4, 1e-5)
    quiet = one_by_one(images, {**arguments, "brightness": 1e-9, "contrast": 1e-9})
    changed = one_by_one(images, arguments)
    assert is_kept == any(np.abs(quiet[name] - changed[name]).max() > 0.1 for name in quiet)


@pytest.mark.smoke
def test_types_of_values_and_a_half_precision_context():
    images, transform = tensor(pictures(3)), BatchMultiCrop(**SIZES)
    expected = transform(images, np.random.default_rng(0))
    with paddle.amp.auto_cast():
        found = transform(images.astype("float64") / 255, np.random.default_rng(0))
    for name, views in expected.items():
        np.testing.assert_allclose(found[name].numpy(), views.numpy(), atol=1e-4)
    again = pickle.loads(pickle.dumps(transform))(images, np.random.default_rng(0))
    assert all(np.array_equal(again[name].numpy(), views.numpy()) for name, views in expected.items())


def test_the_arguments_are_those_of_multi_crop():
    assert inspect.signature(BatchMultiCrop) == inspect.signature(MultiCrop)
    with pytest.raises(TypeError, match="local_crop_size"):
        BatchMultiCrop(local_crop_size=8)
    with pytest.raises(ValueError, match="flip_prob must be a probability"):
        BatchMultiCrop(flip_prob=2.0)


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (lambda x: x.numpy(), TypeError, r"must be a Tensor \[B, C, H, W\], not ndarray: .* paddle.stack"),
        (lambda x: [x[0], x[1]], TypeError, "not list"),
        (lambda x: x[0], ValueError, r"must be \[B, C, H, W\], none of them 0, not \[3, 60, 80\]"),
        (lambda x: x[:0], ValueError, r"not \[0, 3, 60, 80\]"),
        (lambda x: x.astype("int64"), TypeError, "must be uint8, or floats in 0..1, not .*int64"),
        (lambda x: x.astype("float32"), ValueError, "values in 0..1, not 0..255: give uint8, or divide by 255"),
        (
            lambda x: (x.astype("float32") / 255 - 0.5) / 0.25,
            ValueError,
            "not -2..2: these look normalised already; give images in 0..1, and set mean and std",
        ),
        (lambda x: x.astype("float32") * float("nan"), ValueError, "some are NaN or infinite"),
        (lambda x: x[:, :2], ValueError, "mean and std have 3 values, and the image 2 channels"),
    ],
)
def test_what_is_no_batch_of_images(images, error, text):
    batch = tensor(pictures(2))
    batch[:, :, 0, 0], batch[:, :, 0, 1] = 0, 255
    with pytest.raises(error, match=text):
        BatchMultiCrop(**SIZES)(images(batch), np.random.default_rng(0))


def dense(band, length: int) -> np.ndarray:
    first, weights = band
    matrix = np.zeros((*weights.shape[:2], length))
    np.put_along_axis(matrix, first[..., None] + np.arange(weights.shape[2]), weights, 2)
    return matrix


def three_boxes(line: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    for _ in range(3):
        line = np.convolve(np.pad(line, len(kernel) // 2, "edge"), kernel, "valid")
    return line


@pytest.mark.parametrize("length", [1, 2, 5, 12, 13, 14, 40])
def test_bands_of_short_and_long_axes(length):
    """Rows in the middle are made once, those near the ends one by one: against the definition,
    Pillow and OpenCV."""
    line = np.random.default_rng(0).random((1, 1, length)).astype(np.float32)
    radii = [0.1, 0.7, 2.0]
    for radius, matrix in zip(radii, dense(gaussian_band(radii, length), length)):
        np.testing.assert_allclose(matrix @ line[0, 0], blur_planes(line, radius)[0, 0], atol=2e-6)
    for radius, matrix in zip(radii, dense(box_blur_band(radii, length), length)):
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-7)
        expected = three_boxes(line[0, 0], box_kernel(radius))
        np.testing.assert_allclose(matrix @ line[0, 0], expected, atol=1e-4)
    matrix = dense(resize_band(np.array([0]), np.array([length]), np.array([False]), length, 7), length)[0]
    expected = Image.fromarray(line[0]).resize((7, 1), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(matrix @ line[0, 0], np.asarray(expected)[0], atol=2e-6)


def test_importing_it_does_not_import_paddle():
    program = "import sys, passl.data.batch_views; print('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"


def test_no_call_leaves_memory_behind(monkeypatch):
    """paddle.to_tensor does, 100 bytes each time."""
    images, transform = tensor(pictures(3)), BatchMultiCrop(**SIZES)

    def refuse(*_, **__):
        raise AssertionError("paddle.to_tensor in what every step does")

    monkeypatch.setattr(paddle, "to_tensor", refuse)
    assert transform(images, np.random.default_rng(0))["local_crops"].shape == [9, 3, 16, 24]
