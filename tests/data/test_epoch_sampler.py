"""Which samples make a batch: order, shares of processes, and where a run may begin."""

from __future__ import annotations

import numpy as np
import pytest

from passl.data.loader import EpochSampler


def indices(batches) -> list[list[int]]:
    return [[index for _, index in batch] for batch in batches]


def test_an_epoch_is_a_seeded_permutation() -> None:
    sampler = EpochSampler(length=10, batch_size=3, seed=5)
    assert sampler.steps_per_epoch == 3
    batches = list(sampler.batches(0, 6))
    for epoch in (0, 1):
        order = np.random.default_rng([5, epoch]).permutation(10)[:9].tolist()
        samples = [sample for batch in batches[3 * epoch : 3 * epoch + 3] for sample in batch]
        assert samples == [(epoch, index) for index in order]


def test_without_shuffle_and_drop_last_the_tail_is_kept() -> None:
    sampler = EpochSampler(length=10, batch_size=4, shuffle=False, drop_last=False)
    assert indices(sampler.batches(0, sampler.steps_per_epoch)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.smoke
@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_any_step_can_be_the_first(start: int) -> None:
    sampler = EpochSampler(length=11, batch_size=2, seed=1)
    everything = list(sampler.batches(0, 20))
    assert list(sampler.batches(start, 20)) == everything[start:]
    endless = sampler.batches(start)
    assert [next(endless) for _ in range(7)] == everything[start : start + 7]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_the_batches_that_one_process_would_have(world_size: int, drop_last: bool) -> None:
    one = EpochSampler(length=41, batch_size=4 * world_size, seed=2, drop_last=drop_last)
    many = [
        EpochSampler(41, 4, seed=2, rank=rank, world_size=world_size, drop_last=drop_last) for rank in range(world_size)
    ]
    steps = 2 * one.steps_per_epoch
    shares = zip(*(sampler.batches(0, steps) for sampler in many))
    for whole, parts in zip(one.batches(0, steps), shares):
        assert len({len(part) for part in parts}) == 1, "all processes have equally many"
        gathered = [sample for row in zip(*parts) for sample in row]
        assert gathered[: len(whole)] == whole
        assert set(gathered) == set(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 5, "batch_size": 6}, "5 samples do not fill one global batch of 6 x 1 process"),
        ({"length": 0, "batch_size": 6, "drop_last": False}, "0 samples do not fill .*: add images"),
        ({"length": 5, "batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"length": 5, "batch_size": 1, "rank": 2, "world_size": 2}, r"rank \(2\) must be .* less than"),
    ],
)
def test_bad_sampler_arguments_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSampler(**arguments)
