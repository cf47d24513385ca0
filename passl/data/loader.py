"""Batches for training and evaluation: which samples, in which order, drawn how, loaded by whom.

The order of an epoch is drawn by `default_rng([seed, epoch])`, a sample's augmentation by `default_rng([seed, epoch,
index])`, what is done with a whole batch by its first sample's epoch and index: batches do not depend on the number of
workers, and a run can continue at any step.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional

import numpy as np

from passl.data.batches import BatchTransform, LoadedBatch, load_batch
from passl.data.samples import Samples

logger = logging.getLogger("passl")

_SUBSET = 0x70637400  # beside the seed, where the order of an epoch has the epoch: no epoch is as large


class BadSamplesError(RuntimeError):
    """More files than allowed could not be read. `bad_samples` lists them as (path, reason)."""

    def __init__(self, limit: str, bad_samples: list[tuple[str, str]]) -> None:
        super().__init__(limit, bad_samples)
        self.limit = limit
        self.bad_samples = bad_samples

    def __str__(self) -> str:
        files = "\n".join(f"  {path}: {reason}" for path, reason in self.bad_samples)
        return f"{self.limit} cannot be read; repair or remove them, or raise the limit:\n{files}"


class EpochSampler:
    """Divides epochs into global batches of `batch_size * world_size` samples and those among the processes.

    Process `rank` takes every `world_size`-th sample of a global batch, so the samples of a step depend on
    `batch_size * world_size` only. Without `drop_last` the last batch of an epoch is smaller; it is filled up
    to a multiple of `world_size` by repeating its first samples, so that all processes have equally many.

    Args:
        length: number of samples in the data set.
        batch_size: per process.
        seed: of the order; the order of epoch e is `default_rng([seed, e]).permutation(length)`.
        shuffle: False keeps the data set's order.
        drop_last: leave out the samples of an epoch that do not fill a global batch.
        pct: use this share of the samples, more than 0 and at most 1 (None): the same `pct * length` of them (rounded
            down) in all epochs and processes, drawn from the seed; a smaller share's are among a larger share's. The
            order then permutes these.

    Attributes:
        subset: sorted indices of the samples used, None for all.

    Raises:
        ValueError: an argument is out of range, or no batch can be filled.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        pct: Optional[float] = None,
    ) -> None:
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1 and seed ({seed}) at least 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank ({rank}) must be at least 0 and less than world_size ({world_size})")
        if pct is not None and not 0 < pct <= 1:  # also NaN
            raise ValueError(f"pct ({pct}) must be more than 0 and at most 1, a share of the samples")
        self.subset = None if pct in (None, 1) else _share_of(length, pct, seed)
        count = length if self.subset is None else len(self.subset)
        self.global_batch_size = batch_size * world_size
        self.steps_per_epoch = count // self.global_batch_size if drop_last else -(-count // self.global_batch_size)
        if self.steps_per_epoch == 0:
            share = "" if self.subset is None else f" (pct {pct} of {length})"
            remedies = ["raise pct"] if share else []
            remedies += ["lower batch_size or set drop_last: false"] if count else []
            raise ValueError(
                f"{count} samples{share} do not fill one global batch of {batch_size} x {world_size} process(es): "
                f"{', '.join(remedies) or 'add images'}"
            )
        self.length = length
        self.num_samples = count
        self.pct = 1.0 if pct is None else float(pct)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle

    def batches(self, start_step: int = 0, stop_step: Optional[int] = None) -> Iterator[list[tuple[int, int]]]:
        """This process's batches of the steps `start_step .. stop_step - 1`, as lists of (epoch, index).

        Steps count from the beginning of epoch 0 and run on into the following epochs, without end if
        `stop_step` is None.
        """
        current_epoch = None
        for step in itertools.count(start_step) if stop_step is None else range(start_step, stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current_epoch:
                current_epoch, order = epoch, self._order(epoch)
            yield [(epoch, int(index)) for index in self._share(order, position)]

    def _order(self, epoch: int) -> np.ndarray:
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        else:
            order = np.arange(self.num_samples)
        return order if self.subset is None else self.subset[order]

    def _share(self, order: np.ndarray, position: int) -> np.ndarray:
        global_batch = order[position * self.global_batch_size : (position + 1) * self.global_batch_size]
        padded_size = -(-len(global_batch) // self.world_size) * self.world_size
        return np.resize(global_batch, padded_size)[self.rank :: self.world_size]


def _share_of(length: int, pct: float, seed: int) -> np.ndarray:
    count = math.floor(round(pct * length, 6))  # 0.29 * 100 is a little below 29
    return np.sort(np.random.default_rng([seed, _SUBSET]).permutation(length)[:count])


class Loader:
    """Loads the batches of `sampler` from `dataset`, in this process or with worker processes.

    Files that cannot be read are replaced by other samples, reported through the logger "passl" and collected
    in `bad_samples`. With several processes the limit holds for all together, in `share_bad_samples`.

    Args:
        seed: of the samples' randomness; use the same on all processes.
        num_workers: 0 loads in this process; so does any number on systems other than Linux, where Paddle has
            no workers.
        prefetch_factor: batches that each worker prepares in advance.
        use_shared_memory: False sends batches through pipes, which is slower, for machines with a small /dev/shm.
        batch_transform: called with the numpy arrays of each batch and a generator; returns the batch's arrays, which
            keep their samples and "index".
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: EpochSampler,
        num_workers: int = 0,
        seed: int = 0,
        prefetch_factor: int = 2,
        use_shared_memory: bool = True,
        batch_transform: Optional[BatchTransform] = None,
    ) -> None:
        if num_workers < 0 or prefetch_factor < 1:
            raise ValueError(
                f"num_workers ({num_workers}) must be at least 0 and prefetch_factor ({prefetch_factor}) at least 1"
            )
        self.dataset = dataset
        self.sampler = sampler
        self.num_workers = num_workers
        self.seed = seed
        self.prefetch_factor = prefetch_factor
        self.use_shared_memory = use_shared_memory
        self.batch_transform = batch_transform
        self._reason_of_bad_path: dict[str, str] = {}
        self._unshared: list[tuple[str, str]] = []

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    @property
    def bad_samples(self) -> list[tuple[str, str]]:
        """(path, reason) of every unreadable file met so far by this process and, once shared, by the others."""
        return list(self._reason_of_bad_path.items())

    @property
    def num_unshared_bad_samples(self) -> int:
        """Unreadable files that this process met since `share_bad_samples`."""
        return len(self._unshared)

    def share_bad_samples(self, gather: Callable[[Any], list[Any]]) -> None:
        """Name and count those of all processes together; to be called by all at the same step.

        Args:
            gather: a value -> the values of all processes, in the same order on each.

        Raises:
            BadSamplesError: on all processes, if more than `max_bad_samples` files cannot be read.
        """
        for samples in gather(self._unshared):
            self._note(samples)
        self._unshared = []
        self._check_limit()

    def iterate(self, start_step: int = 0, stop_step: Optional[int] = None) -> Iterator[dict[str, Any]]:
        """The batches of the steps `start_step .. stop_step - 1`: dicts of Paddle tensors, or of numpy arrays
        if there are no workers.

        `index` and, if there are labels, `label`: int64 [B], of the samples that are really in the batch,
        also where a sample replaces an unreadable one. Multi-crop views: `global_crops` [2*B, 3, h, w] and
        `local_crops` [n*B, 3, h, w], view by view (all samples' view 0, then view 1, ...). Otherwise `image`
        [B, ...].

        Worker processes start at the first batch and stay until the last one: call this once for a whole run. They
        hold at most `num_workers * prefetch_factor` batches in shared memory.

        Raises:
            WorkerDiedError: a worker process was killed or ended; names the sample it was loading.
            BadSamplesError: more than the data set's `max_bad_samples` files cannot be read (one process), or none.
            Exception: what the data set or a transform raised; its cause names the sample and its file.
        """
        batches = self.sampler.batches(start_step, stop_step)
        for loaded in self._loaded(batches):
            self._note_bad_samples(loaded)
            yield loaded.arrays

    def _loaded(self, batches: Iterator[list[tuple[int, int]]]) -> Iterator[LoadedBatch]:
        load = functools.partial(load_batch, self.dataset, seed=self.seed, batch_transform=self.batch_transform)
        if self.num_workers == 0 or not sys.platform.startswith("linux"):
            return map(load, batches)
        # Imported here: it imports Paddle, which this package otherwise does without.
        from passl.data import workers

        return workers.load(self.dataset, load, batches, self.num_workers, self.prefetch_factor, self.use_shared_memory)

    def _note_bad_samples(self, loaded: LoadedBatch) -> None:
        self._unshared += self._note(loaded.bad_samples)
        if self.sampler.world_size == 1:  # one of several that stopped by itself would leave the others waiting
            self._check_limit()
        if loaded.arrays is None:
            raise BadSamplesError("all image files", self.bad_samples)

    def _note(self, samples: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Log and keep those that are new, and return them."""
        limit = self.dataset.max_bad_samples
        new = []
        for path, reason in samples:
            if path not in self._reason_of_bad_path:
                self._reason_of_bad_path[path] = reason
                count = len(self._reason_of_bad_path)
                logger.warning("unreadable image %d (of at most %d) replaced: %s: %s", count, limit, path, reason)
                new.append((path, reason))
        return new

    def _check_limit(self) -> None:
        limit = self.dataset.max_bad_samples
        if len(self._reason_of_bad_path) > limit:
            raise BadSamplesError(f"more than max_bad_samples ({limit}) image files", self.bad_samples)
