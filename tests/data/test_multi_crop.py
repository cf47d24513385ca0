"""MultiCrop: shapes, counts, recipe, determinism. Its statistics are in test_view_statistics.py."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from passl.data import transforms as T
from passl.data.backends import BACKENDS, make_backend
from passl.data.backends.pillow import render_view
from passl.data.multi_crop import MultiCrop
from passl.data.views import ViewParameters


@pytest.fixture
def image() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    return Image.fromarray(values).resize((100, 80), Image.Resampling.BICUBIC)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.mark.smoke
@pytest.mark.parametrize("num_local_crops", [0, 1, 5])
@pytest.mark.parametrize(("size", "sides"), [(24, (24, 24)), ([16, 24], (16, 24))])
def test_shapes(image: Image.Image, backend: str, num_local_crops: int, size, sides: tuple[int, int]) -> None:
    multi_crop = MultiCrop(size, local_crops_size=8, num_local_crops=num_local_crops, backend=backend)
    views = multi_crop(image, np.random.default_rng(0))
    assert views["global_crops"].shape == (2, 3, *sides)
    if num_local_crops:
        assert views["local_crops"].shape == (num_local_crops, 3, 8, 8)
    else:
        assert "local_crops" not in views
    assert all(array.dtype == np.float32 for array in views.values())


def test_the_generator_decides(image: Image.Image, backend: str) -> None:
    multi_crop = MultiCrop(16, 8, backend=backend)
    first, again, other = (multi_crop(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for name in ("global_crops", "local_crops"):
        assert first[name].tobytes() == again[name].tobytes()
        assert first[name].tobytes() != other[name].tobytes()


def test_without_augmentation_a_full_view_is_the_resized_image(image: Image.Image, backend: str) -> None:
    multi_crop = MultiCrop(
        global_crops_size=[40, 50],
        global_crops_scale=(1.0, 1.0),
        num_local_crops=0,
        ratio=(1.25, 1.25),
        flip_prob=0.0,
        jitter_prob=0.0,
        gray_prob=0.0,
        global_blur_probs=(0.0, 0.0),
        global_solarize_probs=(0.0, 0.0),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        backend=backend,
    )
    views = multi_crop(image, np.random.default_rng(0))["global_crops"]
    expected = T.ToTensor()(image.resize((50, 40), Image.Resampling.BICUBIC))
    levels = {"pillow": 0, "opencv": 2}[backend]
    np.testing.assert_allclose(views, np.stack([expected, expected]), rtol=0, atol=(levels + 0.01) / 255)


def test_operations_are_applied_in_the_official_order(image: Image.Image, backend: str) -> None:
    view = ViewParameters(
        box=T.Box(5, 10, 60, 70),
        flip=True,
        jitter=(("hue", 0.08), ("brightness", 1.3), ("saturation", 0.9), ("contrast", 0.7)),
        gray=True,
        blur_radius=1.2,
        solarize=True,
    )
    expected = T.horizontal_flip(T.resized_crop(image, view.box, (32, 32), "bicubic"))
    expected = T.adjust_brightness(T.adjust_hue(expected, 0.08), 1.3)
    expected = T.adjust_contrast(T.adjust_saturation(expected, 0.9), 0.7)
    expected = T.solarize(T.gaussian_blur(T.grayscale(expected), 1.2))
    assert render_view(image, view, (32, 32)) == expected
    opened = make_backend(backend, (0.0,) * 3, (1.0,) * 3).open(image)
    opened.decode()
    out = np.empty((3, 32, 32), np.float32)
    opened.render(view, (32, 32), out)
    wrong = np.abs(out - T.ToTensor()(expected)) * 255 > 2.5
    # Solarising turns a difference of one level at its threshold into a large one.
    assert wrong.mean() <= {"pillow": 0.0, "opencv": 0.01}[backend]


def test_the_official_recipe_is_the_default() -> None:
    multi_crop = MultiCrop()
    first, second = multi_crop.global_recipes
    local = multi_crop.local_recipe
    assert multi_crop.num_local_crops == 8
    assert [recipe.size for recipe in (first, second, local)] == [(224, 224), (224, 224), (96, 96)]
    assert [recipe.scale for recipe in (first, second, local)] == [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)]
    assert [recipe.blur_prob for recipe in (first, second, local)] == [1.0, 0.1, 0.5]
    assert [recipe.solarize_prob for recipe in (first, second, local)] == [0.0, 0.2, 0.0]
    for recipe in (first, second, local):
        assert recipe.ratio == (3 / 4, 4 / 3)
        assert recipe.blur_radius == (0.1, 2.0)
        assert recipe.jitter_strengths == (0.4, 0.4, 0.2, 0.1)
        assert (recipe.flip_prob, recipe.jitter_prob, recipe.gray_prob) == (0.5, 0.8, 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_local_crops": -1}, "num_local_crops must be at least 0, not -1"),
        ({"global_crops_size": [8, 8, 8]}, "global_crops_size must be a positive int or [height, width]"),
        ({"local_crops_scale": (0.0, 0.4)}, "local_crops_scale must be [low, high] with 0 < low <= high <= 1.0"),
        ({"global_blur_probs": (1.0,)}, "one value for each of the two global views"),
        ({"backend": "pil"}, "backend must be one of opencv, pillow, not 'pil'"),
        ({"global_solarize_probs": (0.0, 2.0)}, "global_solarize_probs must be a probability"),
    ],
)
def test_bad_arguments_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        MultiCrop(**arguments)
    assert message in str(error.value)
