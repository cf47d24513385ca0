"""The masks of DINOv2 against statistics of the official code, and what they do in a loader."""

from __future__ import annotations

import json

import numpy as np
import pytest

from passl.config import ConfigError, check
from passl.data.batches import SampleError
from passl.data.datasets import ImageFolder
from passl.data.loader import EpochSampler, Loader
from passl.data.masks import BlockMaskGenerator, BlockMasks
from passl.data.multi_crop import MultiCrop
from passl.registry import BATCH_TRANSFORMS
from tests.engine import tiny


def batch(num_crops: int, height: int, width: int) -> dict:
    return {
        "global_crops": np.zeros((num_crops, 3, height, width), np.float32),
        "index": np.arange(num_crops // 2),
    }


def recorded_rows(reference) -> list[tuple]:
    """-> [(settings, statistics of one number of requested patches)]"""
    recorded = json.loads((reference / "dinov2_masking.json").read_text())
    return [(case["settings"], row) for case in recorded.values() if "rows" in case for row in case["rows"].values()]


@pytest.mark.smoke
def test_statistics_of_single_masks(reference) -> None:
    rows = recorded_rows(reference)
    assert rows
    for settings, row in rows:
        height, width = settings["input_size"]
        largest = int(settings.get("max_num_patches") or settings["num_masking_patches"])
        generator = BlockMaskGenerator((height, width), max_num_patches=largest)
        n, requested = row["n"], row["requested"]
        masks = generator.masks([requested] * n, np.random.default_rng(0)).reshape(n, height, width)
        counts = masks.sum((1, 2))
        boundary = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
        assert counts.max() <= requested
        # Of a difference of two samples of n each; the spread of a standard deviation comes from the fourth moment.
        errors = {"count_mean": counts.std(), "boundary_mean": boundary.std()}
        found = {"count_mean": counts.mean(), "boundary_mean": boundary.mean()}
        for name, values in (("count_std", counts), ("boundary_std", boundary)):
            found[name] = values.std()
            fourth = ((values - values.mean()) ** 4).mean()
            errors[name] = np.sqrt(max(fourth - values.var() ** 2, 0)) / (2 * max(values.std(), 1e-9))
        per_mask = {"exactly_requested": counts == requested}
        if height == width and height % 4 == 0:
            quarter = height // 4
            per_mask["centre_rate"] = masks[:, quarter:-quarter, quarter:-quarter].mean((1, 2))
            sides = [masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]]
            per_mask["border_rate"] = np.concatenate(sides, 1).mean(1)
        for name, values in per_mask.items():
            found[name], errors[name] = values.mean(), values.std()
        for name, value in found.items():
            assert abs(value - row[name]) <= 4.5 * np.sqrt(2 / n) * errors[name] + 1e-9, (settings, requested, name)
        for percent, value in row["count_quantiles"].items():
            assert abs(np.percentile(counts, int(percent)) - value) <= 1, (settings, requested, percent)


def test_blocks_are_drawn_as_said() -> None:
    """One block of any area: aspect ratios even in their logarithm, all places, never more than asked for."""
    generator = BlockMaskGenerator((24, 24), max_num_patches=80)
    rng = np.random.default_rng(0)
    shapes = []
    for _ in range(2000):
        block = generator._arrays([generator._block(0, 80, rng)])[0].reshape(24, 24)
        rows, columns = np.flatnonzero(block.any(1)), np.flatnonzero(block.any(0))
        assert block[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "it is a rectangle"
        shapes.append((len(rows), len(columns)))
    heights, widths = np.array(shapes).T
    areas, aspects = heights * widths, np.log(heights / widths)
    assert areas.min() >= 3  # 4 before the sides are rounded
    assert areas.max() <= 80
    assert abs(areas.mean() - 42) < 2
    assert abs(aspects.mean()) < 0.06
    assert np.quantile(aspects, [0.05, 0.95]) == pytest.approx([-1.08, 1.08], abs=0.15)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (2, 2), (3, 5), (7, 4), (16, 16), (37, 37)])
def test_any_grid(grid) -> None:
    generator = BlockMaskGenerator(grid)
    rng = np.random.default_rng(0)
    num_patches = grid[0] * grid[1]
    for requested in sorted({0, 1, num_patches // 4, num_patches // 2, num_patches}):
        counts = [int(generator(requested, rng).sum()) for _ in range(20)]
        assert max(counts) <= requested
        # Of a grid of few patches most blocks are too large; then, as officially, a mask may even stay empty.
        assert min(grid) < 3 or requested < 4 or min(counts) >= 1
    assert generator(num_patches, rng).shape == (num_patches,)


def test_the_largest_block() -> None:
    generator = BlockMaskGenerator((16, 16), max_num_patches=5)
    rng = np.random.default_rng(0)
    assert max(bin(generator._block(0, 5, rng)).count("1") for _ in range(300)) in (4, 5)
    assert generator(60, rng).sum() >= 50


def test_statistics_of_batches(reference) -> None:
    recorded = json.loads((reference / "dinov2_masking.json").read_text())["collate"]
    grids = [settings["input_size"] for settings, _ in recorded_rows(reference)]
    height, width = next(grid for grid in grids if grid[0] * grid[1] == recorded["n_tokens"])
    crops = 2 * recorded["batch"]
    transform = BlockMasks(4, recorded["mask_probability"], recorded["mask_ratio"])
    rng = np.random.default_rng(0)
    masks = np.stack([transform(batch(crops, 4 * height, 4 * width), rng)["masks"] for _ in range(400)])
    assert masks.shape == (400, crops, recorded["n_tokens"])
    assert masks.dtype == bool
    counts = masks.sum(2)
    assert sorted(set((counts > 0).sum(1).tolist())) == recorded["masked_images"]
    totals = counts.sum(1)
    error = recorded["total_masked_std"] * np.sqrt(1 / recorded["n"] + 1 / 400)
    assert abs(totals.mean() - recorded["total_masked_mean"]) < 4.5 * error
    assert totals.std() == pytest.approx(recorded["total_masked_std"], rel=0.2)
    # Every crop is as likely to be masked, and as much.
    share = recorded["masked_images"][0] / crops
    assert np.abs((counts > 0).mean(0) - share).max() < 4.5 * np.sqrt(share * (1 - share) / 400)


def test_ratios_are_stratified() -> None:
    transform = BlockMasks(1, 0.5, (0.1, 0.5))
    for seed in range(20):
        counts = np.sort(transform(batch(16, 16, 16), np.random.default_rng(seed))["masks"].sum(1))
        assert (counts[:8] == 0).all()
        bounds = 256 * np.linspace(0.1, 0.5, 9)
        # A mask may hide a few less than asked for.
        assert (counts[8:] <= bounds[1:]).all()
        assert (counts[8:] >= bounds[:-1] - 6).all()


def test_one_collated_batch(reference) -> None:
    """What the losses need of the masks: flat indices, and 1/number in the image for each of them."""
    import paddle

    from passl.models.dinov2.method import hidden_patches

    recorded = np.load(reference / "dinov2_collate.npz")
    names = {name.split("/")[0] for name in recorded.files}
    for name in sorted(names):
        masks = recorded[f"{name}/collated_masks"]
        indices, weights = hidden_patches(paddle.to_tensor(masks))
        np.testing.assert_array_equal(indices.numpy(), recorded[f"{name}/mask_indices_list"])
        np.testing.assert_allclose(weights.numpy(), recorded[f"{name}/masks_weight"], rtol=1e-6)
        # Ours have the layout of the official ones: a row for each crop.
        ours = BlockMasks(1)(batch(len(masks), 1, masks.shape[1]), np.random.default_rng(0))["masks"]
        assert ours.shape == masks.shape


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 3, 28, 28))}, "'global_crops', and the batch has only image: .* transform MultiCrop"),
        (batch(4, 28, 30), r"patch_size \(14\) does not divide the global crops of 28 x 30 pixels"),
    ],
)
def test_batches_that_do_not_fit(arrays, message) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockMasks(14)(arrays, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, r"patch_size \(0\) must be at least 1"),
        ({"mask_prob": 1.5}, r"mask_prob \(1.5\) must be in \[0, 1\]"),
        ({"mask_ratio": [0.5, 0.1]}, r"mask_ratio \(\[0.5, 0.1\]\) must be two shares"),
        ({"mask_ratio": [0.5]}, r"mask_ratio \(\[0.5\]\) must be two shares"),
        ({"min_num_patches": 0}, r"min_num_patches \(0\) must be at least 1"),
        ({"max_num_patches": 0}, r"max_num_patches \(0\) must be at least 1"),
        ({"min_aspect": 2.0}, r"min_aspect \(2.0\) must be more than 0 and at most 1"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMasks(**{"patch_size": 14, **arguments})


@pytest.mark.parametrize(("mask_prob", "masked"), [(0.0, 0), (1.0, 6)])
def test_none_and_all(mask_prob, masked) -> None:
    masks = BlockMasks(4, mask_prob)(batch(6, 32, 32), np.random.default_rng(0))["masks"]
    assert masks.shape == (6, 64)
    assert masks.any(1).sum() == masked


# --- in a loader ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    tiny.write_images(folder)
    return folder


def batches(folder, num_workers=0, start_step=0, transform=None, **sampling) -> list[dict]:
    crops = MultiCrop(global_crops_size=16, local_crops_size=8, num_local_crops=1)
    dataset = ImageFolder(folder / "train", transform=crops)
    sampler = EpochSampler(len(dataset), 4, seed=1, drop_last=False, **sampling)
    transform = transform or BlockMasks(2)
    loader = Loader(dataset, sampler, num_workers=num_workers, seed=1, batch_transform=transform)
    return [{key: np.asarray(value) for key, value in one.items()} for one in loader.iterate(start_step, 8)]


@pytest.mark.smoke
def test_masks_depend_neither_on_workers_nor_on_where_a_run_goes_on(folder) -> None:
    expected = batches(folder)
    assert [len(one["index"]) for one in expected] == [4, 4, 4, 3] * 2
    assert all(one["masks"].shape == (2 * len(one["index"]), 64) for one in expected)
    assert len({one["masks"].tobytes() for one in expected}) == len(expected)
    for other in (batches(folder, num_workers=2), batches(folder, start_step=3)):
        for one, same in zip(expected[-len(other) :], other):
            assert one.keys() == same.keys()
            for key in one:
                assert one[key].dtype == same[key].dtype
                np.testing.assert_array_equal(one[key], same[key])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "the batch transform Odd must return the batch, a dict of arrays with 'index'"),
        ({"masks": np.zeros(8)}, TypeError, "the batch transform Odd must return the batch"),
        (
            {"index": np.arange(4), "masks": np.zeros((5, 2))},
            ValueError,
            r"Odd returned 'masks' with shape \[5, 2\]: of 4 samples it must have 4 rows, or 4 for each view",
        ),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batch_transforms_that_return_no_batch(folder, num_workers, returned, error, message) -> None:
    class Odd:
        def __call__(self, arrays, rng):
            return returned

    with pytest.raises(error, match=message) as raised:
        batches(folder, num_workers, transform=Odd())
    assert isinstance(raised.value.__cause__, SampleError)
    assert "in the batch whose first sample is" in str(raised.value.__cause__)


def test_the_configuration_is_checked() -> None:
    from passl.engine.settings import schema

    sections = schema(training=True)["DataLoader"].schema["Train"].schema
    spec = {"name": "BlockMasks", "patch_size": 14, "mask_ratio": [0.1, 0.4]}
    check({"batch_transform": spec}, {"batch_transform": sections["batch_transform"]})
    for changed, message in (
        ({"patch_sise": 14}, "batch_transform.patch_sise: BlockMasks has no such argument. Did you mean 'patch_size'?"),
        ({"name": "BlockMask"}, "unknown batch transform 'BlockMask'. Did you mean 'BlockMasks'?"),
        ({"mask_prob": "half"}, "batch_transform.mask_prob: expected float, got"),
    ):
        with pytest.raises(ConfigError) as raised:
            check({"batch_transform": {**spec, **changed}}, {"batch_transform": sections["batch_transform"]})
        assert message in str(raised.value)
    assert "BlockMasks" in BATCH_TRANSFORMS
