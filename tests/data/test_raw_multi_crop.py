"""MultiCrop on images that are not 8-bit RGB."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from passl.data.image_io import ImageSource
from passl.data.multi_crop import MultiCrop

SIZES = {"global_crops_size": 32, "local_crops_size": [16, 24], "num_local_crops": 3}
PLAIN = {"jitter_prob": 0.0, "gray_prob": 0.0, "global_solarize_probs": [0.0, 0.0]}


def smooth(channels: int, height: int = 90, width: int = 70) -> np.ndarray:
    """[H, W, C] in 0..1"""
    small = np.random.default_rng(channels).random((6, 5, channels)).astype(np.float32)
    planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], -1).clip(0, 1)


@pytest.mark.smoke
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (4, np.uint8), (5, np.float32), (13, np.float64)])
def test_views_have_the_channels_of_the_image(channels, dtype):
    transform = MultiCrop(**SIZES, mean=[0.5] * channels, std=[0.2] * channels)
    scale = {np.uint8: 255, np.uint16: 65535}.get(dtype, 1)
    image = (smooth(channels) * scale).astype(dtype)
    views = transform(image, np.random.default_rng(0))
    assert views["global_crops"].shape == (2, channels, 32, 32)
    assert views["local_crops"].shape == (3, channels, 16, 24)
    assert all(view.dtype == np.float32 and np.isfinite(view).all() for view in views.values())
    file = io.BytesIO()
    np.save(file, image)
    source = ImageSource("a.npy", file.getvalue(), channels)
    again = pickle.loads(pickle.dumps(transform))(source, np.random.default_rng(0))
    for name, view in views.items():
        np.testing.assert_array_equal(view, again[name])


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("blur", "largest", "mean"), [(0.0, 0.007, 0.002), (1.0, 0.08, 0.01)])
def test_views_are_those_of_pictures(seed, blur, largest, mean):
    """The same parameters: boxes, flips and blurs agree, up to the rounding of 8 bits and what Pillow
    does differently at the borders of a blurred view."""
    blurs = {"global_blur_probs": [blur, blur], "local_blur_prob": blur}
    transform = MultiCrop(**SIZES, **PLAIN, **blurs, mean=[0.0] * 3, std=[1.0] * 3)
    picture = (smooth(3) * 255).round().astype(np.uint8)
    expected = transform(Image.fromarray(picture), np.random.default_rng(seed))
    found = transform(picture.astype(np.uint16) * 257, np.random.default_rng(seed))
    for name in expected:
        assert np.abs(found[name] - expected[name]).max() < largest
        assert np.abs(found[name] - expected[name]).mean() < mean


def test_colours_are_left_alone_and_what_else_is_drawn_stays_the_same():
    image = smooth(4)
    statistics = {"mean": [0.0] * 4, "std": [1.0] * 4}
    weak = MultiCrop(**SIZES, **statistics, jitter_prob=1.0, gray_prob=0.0, global_solarize_probs=[0.0, 0.0])
    strong = MultiCrop(**SIZES, **statistics, jitter_prob=1.0, gray_prob=1.0, global_solarize_probs=[1.0, 1.0])
    expected, found = (transform(image, np.random.default_rng(0)) for transform in (weak, strong))
    for name, view in found.items():
        np.testing.assert_array_equal(view, expected[name])
    for view in strong(np.full_like(image, 0.25), np.random.default_rng(0)).values():
        np.testing.assert_allclose(view, 0.25, atol=1e-6)


def test_one_channel_keeps_brightness_and_contrast():
    transform = MultiCrop(**SIZES, mean=[0.0], std=[1.0], jitter_prob=1.0)
    views = transform(np.full((40, 50, 1), 0.25, np.float32), np.random.default_rng(0))
    levels = views["global_crops"].mean((1, 2, 3))
    assert (np.abs(levels - 0.25) > 1e-3).all()
    assert (levels <= 0.25 * 1.4 + 1e-6).all()


def test_statistics_of_other_channels_than_the_images():
    transform = MultiCrop(**SIZES, mean=[0.5] * 4, std=[0.2] * 4)
    for image in (np.zeros((40, 50, 3), np.uint8), Image.new("RGB", (50, 40)), np.zeros((40, 50, 5), np.float32)):
        with pytest.raises(ValueError, match="mean and std have 4 values, and the image [35] channels"):
            transform(image, np.random.default_rng(0))
