"""The transforms on arrays [H, W, C]: the geometry of pictures, the values of any type."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from passl.data import photometric, transforms
from passl.data.transforms import Box

# Smooth: between its two passes Pillow clips a bicubic filter's overshoot to 8 bits.
SMALL = Image.fromarray((np.random.default_rng(0).random((7, 9, 3)) * 255).astype(np.uint8))
PICTURE = SMALL.resize((53, 37), Image.Resampling.BILINEAR)
ARRAY = np.asarray(PICTURE)


def generator() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "transform",
    [
        transforms.Resize(20, "bicubic"),
        transforms.Resize([60, 31], "bilinear"),
        transforms.CenterCrop(24),
        transforms.CenterCrop([50, 20]),
        transforms.RandomResizedCrop(16, interpolation="bicubic"),
        transforms.RandomHorizontalFlip(1.0),
    ],
    ids=lambda transform: type(transform).__name__,
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_geometry_is_that_of_pictures(transform, dtype):
    """The same pixels, up to the rounding and clipping of 8 bits."""
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]
    array = (ARRAY.astype(np.float64) * scale).astype(dtype)
    expected = np.asarray(transform(PICTURE, generator()), np.float32)
    found = transforms.ToTensor()(transform(array, generator()))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.abs(found.transpose(1, 2, 0).clip(0, 1) * 255 - expected).max() < 1.5


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_channels_are_resized_each_by_itself(channels):
    array = np.random.default_rng(channels).random((30, 41, channels)).astype(np.float32) * 100 - 50
    found = transforms.resize(array, [13, 17], "bicubic")
    assert found.shape == (13, 17, channels)
    for channel in range(channels):
        expected = Image.fromarray(array[:, :, channel]).resize((17, 13), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found[:, :, channel], np.asarray(expected))


def test_what_lies_outside_is_zero():
    array = np.ones((4, 5, 2), np.uint16)
    found = transforms.crop(array, Box(-1, -2, 7, 8))
    assert found.sum() == array.sum()
    assert (found[1:5, 2:7] == 1).all()
    assert not transforms.crop(array, Box(9, 9, 2, 2)).any()


@pytest.mark.parametrize("channels", [1, 5])
def test_blur_keeps_the_mean_and_has_the_deviation(channels):
    array = np.zeros((41, 41, channels), np.float32)
    array[20, 20] = 1.0
    found = transforms.gaussian_blur(array, 1.7)
    assert found.shape == array.shape
    np.testing.assert_allclose(found.sum((0, 1)), 1.0, atol=1e-5)
    offsets = (np.arange(41) - 20) ** 2
    np.testing.assert_allclose((found.sum(1) * offsets[:, None]).sum(0) ** 0.5, 1.7, atol=0.02)


@pytest.mark.smoke
def test_tensors_and_their_normalisation():
    array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4) * 1000
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    found = transforms.Normalize(mean, std)(transforms.ToTensor()(array))
    expected = (array.astype(np.float64) / 65535 - mean) / std
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-6)
    with pytest.raises(ValueError, match="mean and std have 4 values, and the image 3 channels"):
        transforms.Normalize(mean, std)(np.zeros((3, 2, 2), np.float32))


def test_colours_are_for_pictures_only():
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
    five = np.random.default_rng(0).random((6, 7, 5)).astype(np.float32)
    for transform in (jitter, transforms.RandomGrayscale(1.0), transforms.Solarize(1.0)):
        np.testing.assert_array_equal(transform(five, generator()), five)
    one = five[:, :, :1]
    steps = transforms.draw_color_jitter(generator(), 0.4, 0.4, 0.4, 0.4)
    expected = one.astype(np.float64)
    for name, factor in steps:
        if name == "brightness":
            expected = expected * factor
        elif name == "contrast":
            expected = expected * factor + (1 - factor) * expected.mean()
    np.testing.assert_allclose(transforms.apply_color_jitter(one, steps), expected, atol=1e-6)


def test_what_is_off_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(photometric, "_said", set())
    values = {"hue": 0.1, "saturation": 0.0, "gray_prob": 0.2, "global_solarize_probs": [0.0, 0.0], "contrast": 0.4}
    with caplog.at_level(logging.WARNING, "passl"):
        photometric.say_off("MultiCrop", 5, values, chosen=["hue", "contrast", "flip_prob"])
        photometric.say_off("MultiCrop", 5, values)
    assert caplog.messages == [
        "MultiCrop: hue, gray_prob, contrast are off (also what the configuration says: hue: 0.1, contrast: 0.4): no "
        "meaning for images that are not 8-bit RGB, here of 5 channels"
    ]
    photometric.say_off("ColorJitter", 1, {"contrast": 0.4, "brightness": 0.4})
    assert len(caplog.messages) == 1
