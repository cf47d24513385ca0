"""Random erasing: how often, how large, of which shape, and with what."""

import numpy as np
import pytest

from passl.data.erasing import RandomErasing


def erase(seed: int, height: int = 40, width: int = 60, **arguments) -> tuple[np.ndarray, np.ndarray]:
    """The result, and where it differs from an image of sevens [H, W]."""
    image = np.full((3, height, width), 7, np.float32)
    result = RandomErasing(**{"prob": 1.0, **arguments})(image, np.random.default_rng(seed))
    assert (image == 7).all(), "the image itself stays"
    assert result.shape == image.shape
    assert result.dtype == np.float32
    return result, (result != image).any(0)


@pytest.mark.smoke
def test_boxes():
    areas, ratios = [], []
    for seed in range(400):
        _, erased = erase(seed, scale=[0.1, 0.3], ratio=[0.5, 2.0], mode="const")
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert erased.sum() == height * width, "one box"
        areas.append(erased.mean())
        ratios.append(height / width)
    assert min(areas) > 0.09
    assert max(areas) < 0.315
    assert np.mean(areas) == pytest.approx(0.2, abs=0.01)
    assert min(ratios) > 0.45
    assert max(ratios) < 2.2
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.07)


def test_how_often():
    count = sum(erase(seed, prob=0.25)[1].any() for seed in range(1000))
    assert count == pytest.approx(250, abs=45)


def test_fillings():
    for mode in ("const", "rand", "pixel"):
        result, erased = erase(1, mode=mode, value=2.5)
        values = result[:, erased]
        distinct = [len(np.unique(channel)) for channel in values]
        if mode == "const":
            assert (values == 2.5).all()
        elif mode == "rand":
            assert distinct == [1, 1, 1]
            assert len(np.unique(values)) == 3
        else:
            assert distinct == [erased.sum()] * 3
    pixels = np.concatenate([(lambda r, e: r[:, e].ravel())(*erase(seed)) for seed in range(20)])
    assert pixels.mean() == pytest.approx(0, abs=0.03)
    assert pixels.std() == pytest.approx(1, abs=0.03)


def test_a_box_that_never_fits_leaves_the_image():
    assert not erase(0, height=1, width=1)[1].any()
    assert not erase(0, scale=[1.0, 1.0])[1].any()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "noise"}, r"mode \('noise'\) must be 'const', 'rand' or 'pixel'"),
        ({"prob": 1.5}, "prob must be a probability"),
        ({"scale": [0.5, 0.1]}, r"scale must be \[low, high\]"),
        ({"scale": [0.5, 1.1]}, r"scale must be \[low, high\] with 0 < low <= high <= 1.0"),
        ({"ratio": [0, 1]}, "ratio must be"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        RandomErasing(**arguments)


def test_before_totensor_is_an_error():
    with pytest.raises(ValueError, match="put it after ToTensor and Normalize"):
        RandomErasing(prob=1.0)(np.zeros((3, 4, 4), np.uint8), np.random.default_rng(0))
