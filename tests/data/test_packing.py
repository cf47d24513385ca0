"""The views of a batch are written into its memory, and nothing else changes."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import pytest

from passl.data.batches import collate, load_batch
from passl.data.image_io import UnreadableImageError
from passl.data.multi_crop import MultiCrop
from passl.data.packing import BatchMemory, views_array
from passl.data.samples import Samples


class Pictures(Samples):
    """Random pictures. The samples in `bad` write half of their views, and are then unreadable."""

    def __init__(self, transform: Any, bad: frozenset = frozenset(), twice: bool = False) -> None:
        super().__init__(None, (), max_bad_samples=10)
        self.transform = transform
        self.bad = bad
        self.twice = twice

    def __len__(self) -> int:
        return 9

    def describe(self, index: int) -> str:
        return f"picture {index}"

    def content(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        picture = np.random.default_rng(index).integers(0, 256, (30, 40, 3), np.uint8)
        views = self.transform(picture, rng)
        if index in self.bad:
            raise UnreadableImageError(self.describe(index), "for the test")
        return self.transform(picture, rng) if self.twice else views


def expected_batch(dataset: Samples, batch: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    return collate([dataset.sample(index, np.random.default_rng([3, epoch, index])) for epoch, index in batch])


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["opencv", "pillow"])
@pytest.mark.parametrize("twice", [False, True])
def test_batches_are_what_collating_gives(backend: str, twice: bool) -> None:
    dataset = Pictures(MultiCrop([16, 24], 8, num_local_crops=3, backend=backend), twice=twice)
    batch = [(0, 2), (0, 7), (1, 2), (0, 1)]
    arrays = load_batch(dataset, batch, seed=3).arrays
    for name, expected in expected_batch(dataset, batch).items():
        np.testing.assert_array_equal(arrays[name], expected)
    assert arrays["global_crops"].shape == (2 * 4, 3, 16, 24)
    assert arrays["local_crops"].shape == (3 * 4, 3, 8, 8)
    assert all(array.flags.c_contiguous for array in arrays.values())


def test_a_replaced_sample_leaves_no_traces() -> None:
    dataset = Pictures(MultiCrop(16, 8, num_local_crops=2), bad=frozenset({4, 5}))
    loaded = load_batch(dataset, [(0, 4), (0, 0), (0, 5)], seed=0)
    assert {path for path, _ in loaded.bad_samples} >= {"picture 4", "picture 5"}
    views = loaded.arrays["global_crops"]
    assert np.isfinite(views).all()
    np.testing.assert_array_equal(views[1::3], dataset.sample(0, np.random.default_rng([0, 0, 0]))["global_crops"])


def test_views_are_not_copied(monkeypatch) -> None:
    given = []

    def transform(picture: np.ndarray, rng: Optional[np.random.Generator]) -> dict[str, np.ndarray]:
        given.append(views_array("global_crops", (2, 3, 4, 4)))
        given[-1][...] = len(given)
        return {"global_crops": given[-1]}

    views = load_batch(Pictures(transform), [(0, 0), (0, 1), (0, 2)], seed=0).arrays["global_crops"]
    assert all(np.shares_memory(views, array) for array in given)
    assert views[:, 0, 0, 0].tolist() == [1, 2, 3, 1, 2, 3]


def test_memory_is_for_the_batch_being_loaded_only() -> None:
    memory = BatchMemory(2)
    with memory.sample(0):
        first = views_array("local_crops", (1, 3, 2, 2))
        again = views_array("local_crops", (1, 3, 2, 2))
        other = views_array("local_crops", (1, 3, 4, 4))
    outside = views_array("local_crops", (1, 3, 2, 2))
    whole = memory.arrays["local_crops"]
    assert np.shares_memory(first, whole)
    assert not any(np.shares_memory(array, whole) for array in (again, other, outside))
    assert memory.packed("local_crops", [first, again]) is None
