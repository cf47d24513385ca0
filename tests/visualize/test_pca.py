"""Features of patches as colours."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from passl.visualize.pca import Spool, fit, overview, paint


def maps(*sizes, width=12, seed=0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(3, width)) * [[3], [2], [1]]
    return [generator.uniform(-1, 1, (*size, 3)) @ mixing + 5 for size in sizes]


def pictures(features, foreground=False, smooth=False):
    colouring = fit(lambda: features, foreground)
    return [np.asarray(paint(colouring, one, one.shape[1::-1], smooth)) for one in features]


@pytest.mark.smoke
def test_colours_are_the_first_three_components():
    features = maps((60, 90), (50, 40))
    rows = np.concatenate([one.reshape(-1, 12) for one in features])
    centred = rows - rows.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:3]
    directions *= np.sign(directions[range(3), np.abs(directions).argmax(axis=1)])[:, None]
    scores = centred @ directions.T
    got = np.concatenate([picture.reshape(-1, 3) for picture in pictures(features)])
    for channel in range(3):
        low, high = np.quantile(scores[:, channel], [0.01, 0.99])
        wanted = np.clip((scores[:, channel] - low) / (high - low), 0, 1) * 255
        assert np.abs(got[:, channel] - wanted).max() < 2
        assert {got[:, channel].min(), got[:, channel].max()} == {0, 255}


@pytest.mark.parametrize("foreground", [False, True])
def test_the_order_of_images_changes_nothing(foreground):
    features = maps((6, 6), (3, 8), (7, 2), (1, 1))
    forward, backward = pictures(features, foreground), pictures(features[::-1], foreground)[::-1]
    assert all(np.array_equal(one, other) for one, other in zip(forward, backward))


def test_last_digits_change_nothing():
    features = maps((14, 14), (10, 14))
    shaken = [one * (1 + np.random.default_rng(1).normal(size=one.shape) * 1e-7) for one in features]
    for one, other in zip(pictures(features), pictures(shaken)):
        assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.smoke
@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_lies_less_on_the_border(sign):
    features = maps((8, 8), (6, 10), seed=2)
    wanted = [np.zeros(one.shape[:2], bool) for one in features]
    wanted[0][2:6, 3:7], wanted[1][1:5, 2:8] = True, True
    for one, mask in zip(features, wanted):
        one[mask] += sign * 40 * np.ones(12)
    colouring = fit(lambda: features, foreground=True)
    for one, mask, picture in zip(features, wanted, pictures(features, foreground=True)):
        assert np.array_equal(colouring.mask(one), mask)
        assert not picture[~mask].any()
    # Its components are those of the foreground alone.
    inside = np.concatenate([one[mask] for one, mask in zip(features, wanted)])
    np.testing.assert_allclose(colouring.colours.mean, inside.mean(axis=0))


def test_without_a_border_of_its_own_the_smaller_part_is_the_foreground():
    features = np.zeros((1, 9, 4))
    features[0, 7:, 0] = 1
    for turned in (features, -features):
        assert fit(lambda turned=turned: [turned], foreground=True).mask(turned)[0].tolist() == [False] * 7 + [True] * 2


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_fewer_than_three_components(foreground, smooth):
    for features in (np.ones((1, 1, 8)), np.full((5, 4, 8), 0.1, np.float32), np.zeros((3, 3, 1))):
        (picture,) = pictures([features], foreground, smooth)
        assert (picture == 128).all()
    ((picture),) = pictures([np.arange(6.0).reshape(2, 3, 1)], smooth=smooth)
    assert (picture[..., 1:] == 128).all()
    assert picture[0, 0, 0] < picture[1, 2, 0]
    (picture,) = pictures([np.eye(2)[None]], foreground, smooth)
    assert picture.shape == (1, 2, 3)


def test_errors():
    with pytest.raises(ValueError, match="no features"):
        fit(lambda: [])
    with pytest.raises(ValueError, match="features are not finite"):
        fit(lambda: [np.full((2, 2, 3), np.nan)])
    with pytest.raises(ValueError, match="at least one image"):
        overview([])


def test_pictures_have_any_size():
    (features,) = maps((3, 5))
    colouring = fit(lambda: [features])
    nearest, smooth = (paint(colouring, features, (50, 30), smooth) for smooth in (False, True))
    assert nearest.size == smooth.size == (50, 30)
    blocks = np.asarray(nearest).reshape(3, 10, 5, 10, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert len(smooth.getcolors(1500)) > 500


def test_overview_shows_pairs_of_any_shape():
    pairs = [(Image.new("RGB", size, "red"), Image.new("RGB", size, "blue")) for size in [(9, 20), (300, 7), (50, 50)]]
    for count in (1, 2, 3):
        colours = {colour: number for number, colour in overview(pairs[:count]).getcolors(10**6)}
        assert colours[(255, 0, 0)] == colours[(0, 0, 255)] > 0


def test_memory_does_not_grow_with_images(tmp_path):
    (features,) = maps((16, 16), width=64)
    peaks = []
    for count in (8, 80):
        tracemalloc.start()
        with Spool(tmp_path) as spool:
            for _ in range(count):
                spool.add(features)
            assert not list(tmp_path.iterdir()), "the file has no name"
            fit(spool, foreground=True)
            np.testing.assert_array_equal(next(iter(spool())), features.astype(np.float32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000
