"""One batch: its samples, and the replacement of those that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np

from passl.data.image_io import UnreadableImageError
from passl.data.packing import BatchMemory
from passl.data.samples import Samples

VIEW_KEYS = ("global_crops", "local_crops")

# Takes the arrays of a collated batch and a generator, and returns the batch's arrays.
BatchTransform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]

_BATCH = 0x62746368  # after seed, epoch and first sample, so that no sample has the same generator


class SampleError(RuntimeError):
    """The `__cause__` of an exception from a data set or transform: says which sample was being loaded."""


@dataclass
class LoadedBatch:
    """Arrays by name (None: no readable replacement was found), and (path, reason) of the files left out."""

    arrays: Optional[dict[str, Any]]
    bad_samples: list[tuple[str, str]]


def load_batch(
    dataset: Samples,
    batch: Sequence[tuple[int, int]],
    seed: int,
    entering: Optional[Callable[[int, int], None]] = None,
    batch_transform: Optional[BatchTransform] = None,
) -> LoadedBatch:
    """Load and collate the samples (epoch, index) of `batch`, each with `default_rng([seed, epoch, index])`.

    A sample whose file cannot be read is replaced by one that its generator draws. Other exceptions pass, with
    a `SampleError` as their cause that names the sample.

    Args:
        entering: called with (epoch, index) before each sample.
        batch_transform: called with the arrays and a generator of the batch's own, which the seed and the batch's first
            sample give.

    Raises:
        TypeError, ValueError: the batch transform returned no batch.
    """
    samples: list[dict[str, Any]] = []
    bad_samples: list[tuple[str, str]] = []
    memory = BatchMemory(len(batch))
    for position, (epoch, index) in enumerate(batch):
        if entering is not None:
            entering(epoch, index)
        rng = np.random.default_rng([seed, epoch, index])
        try:
            sample = _sample_or_replacement(dataset, index, rng, bad_samples, memory, position)
        except Exception as error:
            raise error from SampleError(f"while loading sample {index} ({dataset.describe(index)}) in epoch {epoch}")
        if sample is None:
            return LoadedBatch(None, bad_samples)
        samples.append(sample)
    arrays = collate(samples, memory)
    if batch_transform is not None:
        arrays = _transformed(arrays, batch_transform, np.random.default_rng([seed, *batch[0], _BATCH]), batch[0])
    return LoadedBatch(arrays, bad_samples)


def _transformed(
    arrays: dict[str, Any], transform: BatchTransform, rng: np.random.Generator, first: tuple[int, int]
) -> dict[str, Any]:
    name = type(transform).__name__
    size = len(arrays["index"])
    try:
        arrays = transform(arrays, rng)
        if not isinstance(arrays, dict) or "index" not in arrays:
            raise TypeError(f"the batch transform {name} must return the batch, a dict of arrays with 'index'")
        for key, value in arrays.items():
            if np.ndim(value) == 0 or len(value) % size or len(arrays["index"]) != size:
                raise ValueError(
                    f"the batch transform {name} returned '{key}' with shape {list(np.shape(value))}: of {size} "
                    f"samples it must have {size} rows, or {size} for each view"
                )
    except Exception as error:
        epoch, index = first
        raise error from SampleError(f"in the batch whose first sample is {index}, in epoch {epoch}")
    return arrays


def _sample_or_replacement(
    dataset: Samples,
    index: int,
    rng: np.random.Generator,
    bad_samples: list[tuple[str, str]],
    memory: BatchMemory,
    position: int,
) -> Optional[dict[str, Any]]:
    failures = 0
    for candidate in _candidates(index, len(dataset) if dataset.pool is None else dataset.pool, rng):
        try:
            with memory.sample(position):
                return dataset.sample(candidate, rng)
        except UnreadableImageError as error:
            bad_samples.append((error.path, error.reason))
            failures += 1
            if failures > dataset.max_bad_samples:
                return None
    return None


def _candidates(index: int, pool: Union[int, np.ndarray], rng: np.random.Generator) -> Iterator[int]:
    yield index
    yield from (int(other) for other in rng.permutation(pool) if other != index)


def collate(samples: Sequence[dict[str, Any]], memory: Optional[BatchMemory] = None) -> dict[str, np.ndarray]:
    """Stack B samples with equal keys: views [V, ...] to [V*B, ...], view by view; all else to [B, ...].

    Args:
        memory: where the views are already if the transform asked it for their arrays; they are not copied then.

    Raises:
        ValueError: the samples' arrays differ in shape.
    """
    return {key: _stack(key, [np.asarray(sample[key]) for sample in samples], memory) for key in samples[0]}


def _stack(key: str, arrays: list[np.ndarray], memory: Optional[BatchMemory]) -> np.ndarray:
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"'{key}' differs in shape between samples of a batch ({shapes[0]} and {shapes[-1]}): give the "
            "dataset a transform that makes sizes equal, such as CenterCrop, or Resize with [height, width]"
        )
    if key not in VIEW_KEYS:
        return np.stack(arrays)
    packed = None if memory is None else memory.packed(key, arrays)
    if packed is not None:
        return packed
    views = np.stack(arrays, axis=1)
    return views.reshape(-1, *views.shape[2:])
