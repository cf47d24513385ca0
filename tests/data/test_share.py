"""`pct`: training on a share of the data, the same one in all epochs, processes and runs of a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from passl.data.batches import load_batch
from passl.data.datasets import ImageList
from passl.data.loader import EpochSampler
from tests.engine import tiny


def drawn(sampler: EpochSampler, epochs: int = 1) -> list[list[int]]:
    return [[index for _, index in batch] for batch in sampler.batches(0, epochs * sampler.steps_per_epoch)]


@pytest.mark.smoke
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("length", "pct", "count"), [(100, 0.1, 10), (100, 0.29, 29), (37, 0.5, 18), (10, 1e-1, 1)])
def test_a_fixed_subset_in_the_order_of_the_epoch(length: int, pct: float, count: int, shuffle: bool) -> None:
    sampler = EpochSampler(length, 1, seed=4, pct=pct, shuffle=shuffle)
    assert sampler.steps_per_epoch == sampler.num_samples == count
    subset = sampler.subset
    assert len(set(subset)) == count
    assert (np.diff(subset) > 0).all()
    assert 0 <= subset.min() <= subset.max() < length
    for epoch in (0, 1):
        order = np.random.default_rng([4, epoch]).permutation(count) if shuffle else np.arange(count)
        batches = sampler.batches(epoch * count, (epoch + 1) * count)
        assert [sample for batch in batches for sample in batch] == [(epoch, index) for index in subset[order]]


@pytest.mark.parametrize("pct", [None, 1, 1.0])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_whole_share_is_everything(pct: float, drop_last: bool) -> None:
    sampler = EpochSampler(23, 4, seed=1, drop_last=drop_last, pct=pct)
    assert sampler.subset is None
    assert drawn(sampler, 3) == drawn(EpochSampler(23, 4, seed=1, drop_last=drop_last), 3)
    assert sampler.pct == 1.0


def test_a_smaller_share_is_part_of_a_larger_one_and_seeds_differ() -> None:
    subsets = [set(EpochSampler(200, 1, seed=7, pct=pct).subset) for pct in (0.05, 0.3, 0.9)]
    assert subsets[0] < subsets[1] < subsets[2]
    other = EpochSampler(200, 1, seed=8, pct=0.3).subset
    assert len(subsets[1] & set(other)) < 45
    # Drawn by itself: not what an epoch of the whole begins with.
    first = np.random.default_rng([7, 0]).permutation(200)[:60]
    assert len(subsets[1] & set(first)) < 45


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_it(world_size: int) -> None:
    one = EpochSampler(90, 2 * world_size, seed=3, pct=0.4, drop_last=False)
    many = [
        EpochSampler(90, 2, seed=3, rank=rank, world_size=world_size, pct=0.4, drop_last=False)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(drawn(one, 2), *(drawn(sampler, 2) for sampler in many)):
        gathered = [index for row in zip(*parts) for index in row]
        assert gathered[: len(whole)] == whole


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pct": 0}, r"pct \(0\) must be more than 0 and at most 1"),
        ({"pct": 10}, r"pct \(10\) must be"),
        ({"pct": -0.1}, r"pct \(-0.1\) must be"),
        ({"pct": float("nan")}, r"pct \(nan\) must be"),
        ({"pct": 0.1}, r"5 samples \(pct 0.1 of 50\) do not fill one global batch of 6 .*: raise pct, lower .* or set"),
        ({"pct": 0.01, "drop_last": False}, r"0 samples \(pct 0.01 of 50\) do not fill .*: raise pct$"),
    ],
)  # fmt: skip
def test_wrong_shares(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EpochSampler(50, 6, **arguments)


def test_unreadable_images_are_replaced_from_the_share(tmp_path: Path) -> None:
    tiny.write_images(tmp_path, classes=1, train=20, size=4)
    files = sorted((tmp_path / "train").rglob("*.png"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    dataset = ImageList(
        list_file=tmp_path / "list.txt", transform=lambda image, rng: np.asarray(image), max_bad_samples=9
    )
    dataset.pool = EpochSampler(20, 1, pct=0.25).subset
    broken, *good = dataset.pool.tolist()
    files[broken].write_bytes(b"broken")
    seen = {int(index) for epoch in range(40) for index in load_batch(dataset, [(epoch, broken)], 0).arrays["index"]}
    assert seen == set(good)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    return folder


def train(folder: Path, **values: object) -> tuple[int, str]:
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(**values))
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_run_on_a_share_and_its_resume(folder: Path) -> None:
    """15 images; batches of 4: 8 of them make 2 steps an epoch."""
    values = {"DataLoader__Train__sampler__pct": 0.55, "Global__output_dir": folder / "out"}
    code, text = train(folder, **values, Global__epochs=2)
    assert code == 0, text
    assert "2 steps per epoch, steps 0 to 4" in text
    assert "training on 8 of 15 samples (pct 0.55)" in text
    resume = {**values, "Global__checkpoint": "auto", "Global__epochs": 3}
    code, text = train(folder, **{**resume, "DataLoader__Train__sampler__pct": 0.6})  # as many steps
    assert code == 1
    assert (
        "saved with pct 0.55, this run has 0.6: it would not be the same run. Use the same data, share of it (pct)"
        in text
    )
    code, text = train(folder, **{**resume, "DataLoader__Train__sampler__pct": 0.3})  # fewer steps
    assert code == 1
    assert "saved with pct 0.55, this run has 0.3" in text
    code, text = train(folder, **resume)
    assert code == 0, text
    assert "at step 4 (epoch 3)" in text
    code, text = train(folder, **{**values, "DataLoader__Train__sampler__pct": 0.2})
    assert code == 2
    assert "DataLoader.Train.sampler: 3 samples (pct 0.2 of 15) do not fill one global batch of 4 x 1" in text


def test_evaluation_takes_no_share(folder: Path) -> None:
    done = tiny.run(tiny.TRAIN, "-c", folder / "probe.yaml", "-o", "DataLoader.Eval.sampler.pct=0.5")
    assert done.returncode == 2
    assert "DataLoader.Eval.sampler.pct: only DataLoader.Train takes a share of the data" in done.stderr
