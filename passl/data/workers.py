"""Loading batches in worker processes, on Paddle's `DataLoader`. Importing this module imports Paddle.

What the `DataLoader` leaves to its user, and is done here: an exception in a worker arrives as another type,
so outcomes cross as data; a batch without any array ends the iteration silently; workers outlive a killed
main process.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle

from passl.data.batches import LoadedBatch, SampleError, load_batch
from passl.data.samples import Samples

_PR_SET_PDEATHSIG = 1


class WorkerDiedError(RuntimeError):
    """A worker process was killed or ended by itself."""


def load(
    dataset: Samples,
    batches: Iterator[list[tuple[int, int]]],
    seed: int,
    num_workers: int,
    prefetch_factor: int,
    use_shared_memory: bool,
) -> Iterator[LoadedBatch]:
    """`load_batch` of each of `batches`, in order, by `num_workers` processes; arrays become Paddle tensors.

    Raises:
        Exception: what `load_batch` raised in the worker; its cause holds the worker's traceback.
        WorkerDiedError: a worker was killed. While this process is not waiting for a batch, Paddle's handler of
            SIGCHLD is faster and raises SystemError.
    """
    loader = paddle.io.DataLoader(
        _Batches(dataset, seed),
        batch_sampler=_OneByOne(batches),
        collate_fn=_only,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        use_shared_memory=use_shared_memory,
        worker_init_fn=functools.partial(_prepare_worker, os.getpid()),
    )
    iterator = _started(loader)
    try:
        for result in _results(iterator):
            bad_samples, error = pickle.loads(result["outcome"])
            if error is not None:
                exception, trace = error
                raise exception from SampleError(f"in a worker process:\n{trace}")
            yield LoadedBatch(result.get("arrays"), bad_samples)
    finally:
        # There is no public way to stop the workers early, and a thread keeps the iterator alive.
        iterator._try_shutdown_all()


def _started(loader: paddle.io.DataLoader) -> Any:
    # The workers are forks. If the garbage collector of one met the remains of an earlier loader, their
    # destructors would wait for ever for threads that a fork lacks. Frozen objects are never collected.
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _results(iterator: Any) -> Iterator[dict[str, Any]]:
    while True:
        try:
            result = next(iterator)
        except StopIteration:
            return
        except SystemError as error:
            exit_codes = [worker.exitcode for worker in iterator._workers if worker.exitcode]
            raise WorkerDiedError(
                f"a data-loading worker ended unexpectedly (exit codes {exit_codes}; -9: killed). Not enough "
                "memory, or /dev/shm too small? Try fewer num_workers, or give the container more shared memory"
            ) from error
        yield result


class _Batches:
    """What the workers index: a whole batch is one item, so that exceptions are caught in one place."""

    def __init__(self, dataset: Samples, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, batch: list[tuple[int, int]]) -> dict[str, Any]:
        try:
            loaded = load_batch(self.dataset, batch, self.seed)
        except Exception as error:
            return _result(None, [], (_picklable(error), traceback.format_exc()))
        return _result(loaded.arrays, loaded.bad_samples, None)


class _OneByOne:
    """Each batch as a list with one item."""

    def __init__(self, batches: Iterator[list[tuple[int, int]]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[list[tuple[int, int]]]]:
        return ([batch] for batch in self.batches)


def _only(items: list[Any]) -> Any:
    return items[0]


def _result(arrays: Any, bad_samples: list[tuple[str, str]], error: Any) -> dict[str, Any]:
    # Bytes travel beside the arrays in the worker's message; as an array they would be copied to the GPU and
    # back.
    outcome = pickle.dumps((bad_samples, error))
    return {"outcome": outcome, "arrays": arrays} if arrays else {"outcome": outcome, "unused": np.zeros(1)}


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    # Pickling runs code of the error's class, which may raise anything.
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _prepare_worker(parent_pid: int, worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the main process, which ends the workers.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # It died before prctl.
        sys.exit(1)
    paddle.base.core.set_num_threads(1)


def _exit_on_signal(signal_number: int, frame: Any) -> None:
    sys.exit(1)  # Runs the worker's clean-up of shared memory, which the signal's default action would not.
