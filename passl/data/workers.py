"""Loading batches in worker processes, on Paddle's `DataLoader`. Importing this module imports Paddle.

What the `DataLoader` leaves to its user, and is done here: an exception in a worker arrives as another type,
so outcomes cross as data; a batch without any array ends the iteration silently; workers outlive a killed
main process; a worker that dies is noticed late, never (without shared memory), or by a signal handler that raises
anywhere, and in no case is its sample named; what it shared stays in /dev/shm.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import glob
import mmap
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

from passl.data.batches import LoadedBatch, SampleError
from passl.data.samples import Samples
from passl.processes import end_with

_SECONDS_TO_END = 3.0  # for workers that are told to; then they are killed

# Linear algebra and OpenMP: (part of the library's file name, functions one of which sets its number of threads).
_THREAD_SETTERS = (
    (
        "openblas",
        (
            "openblas_set_num_threads",
            "openblas_set_num_threads64_",
            "scipy_openblas_set_num_threads",
            "scipy_openblas_set_num_threads64_",
        ),
    ),
    ("mkl_rt", ("MKL_Set_Num_Threads",)),
    ("libgomp", ("omp_set_num_threads",)),
    ("libiomp", ("omp_set_num_threads",)),
    ("libomp", ("omp_set_num_threads",)),
)


class WorkerDiedError(RuntimeError):
    """A worker process was killed or ended by itself; the text names its end and the sample it was loading."""


def load(
    dataset: Samples,
    load_batch: Callable[..., LoadedBatch],
    batches: Iterator[list[tuple[int, int]]],
    num_workers: int,
    prefetch_factor: int,
    use_shared_memory: bool,
) -> Iterator[LoadedBatch]:
    """`load_batch` of each of `batches`, in order, by `num_workers` processes; arrays become Paddle tensors.

    load_batch: that of `passl.data.batches` with all arguments but the batch and `entering`.

    The processes start at the first batch and stay until the last. At most `num_workers * prefetch_factor` batches
    are being made or waiting, beside the one that was yielded last. However it ends, no process and nothing in
    /dev/shm is left.

    Raises:
        Exception: what `load_batch` raised in the worker; its cause holds the worker's traceback.
        WorkerDiedError: a worker was killed or ended; at the next batch, or at once while waiting for one.
    """
    progress = _Progress(num_workers)
    loader = paddle.io.DataLoader(
        _Batches(load_batch, progress),
        batch_sampler=_OneByOne(batches),
        collate_fn=_only,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        use_shared_memory=use_shared_memory,
        worker_init_fn=functools.partial(_prepare_worker, os.getpid()),
    )
    started = time.time()
    iterator = _started(loader)
    try:
        for result in _results(iterator, dataset, progress):
            bad_samples, error = pickle.loads(result["outcome"])
            if error is not None:
                exception, trace = error
                raise exception from SampleError(f"in a worker process:\n{trace}")
            yield LoadedBatch(result.get("arrays"), bad_samples)
    finally:
        _stop(iterator, started)


def _started(loader: paddle.io.DataLoader) -> Any:
    # The workers are forks. If the garbage collector of one met the remains of an earlier loader, their
    # destructors would wait for ever for threads that a fork lacks. Frozen objects are never collected.
    gc.collect()
    gc.freeze()
    try:
        iterator = iter(loader)
    finally:
        gc.unfreeze()
    # Paddle's handler of SIGCHLD would raise SystemError wherever this process is by then, even in its last lines.
    paddle.base.core._erase_process_pids(id(iterator))
    threading.Thread(target=_watch, args=(iterator,), name="passl-workers", daemon=True).start()
    return iterator


def _watch(iterator: Any) -> None:
    """Wake the process that waits for a batch when a worker dies."""
    while not iterator._workers_done_event.is_set():
        multiprocessing.connection.wait([worker.sentinel for worker in iterator._workers], timeout=5)
        # In this order: they are told to end before they do.
        if any(not worker.is_alive() for worker in iterator._workers) and not iterator._workers_done_event.is_set():
            iterator._exit_thread_unexpectedly()
            return


def _results(iterator: Any, dataset: Samples, progress: _Progress) -> Iterator[dict[str, Any]]:
    while True:
        if dead := _dead(iterator):
            raise WorkerDiedError(_obituary(dead, dataset, progress))
        try:
            result = next(iterator)
        except StopIteration:
            return
        except SystemError:
            if dead := _dead(iterator):
                raise WorkerDiedError(_obituary(dead, dataset, progress)) from None  # its text says nothing
            raise
        yield result


def _dead(iterator: Any) -> list[tuple[int, Any]]:
    """(number, process) of the workers that ended although nobody told them to."""
    if iterator._workers_done_event.is_set():
        return []
    return [(number, worker) for number, worker in enumerate(iterator._workers) if not worker.is_alive()]


def _obituary(dead: list[tuple[int, Any]], dataset: Samples, progress: _Progress) -> str:
    parts = []
    for number, worker in dead:
        end = f"ended by itself with exit code {worker.exitcode}"
        if worker.exitcode is not None and worker.exitcode < 0:
            end = f"was killed by signal {-worker.exitcode} ({_signal_name(-worker.exitcode)})"
        parts.append(f"data-loading worker {number} (process {worker.pid}) {end} {progress.where(number, dataset)}")
    codes = {worker.exitcode for _, worker in dead}
    hints = [hint for code, hint in _HINTS.items() if code in codes] or [_OTHER_HINT]
    return "; ".join(parts) + ". " + " ".join(hints)


_HINTS = {
    -signal.SIGKILL: "Without another reason it is the system that kills, for lack of memory: use fewer num_workers or "
    "a smaller prefetch_factor, or look at the size of that image.",
    -signal.SIGBUS: "/dev/shm is full, or a file was cut while it was read: give the container more shared memory, or "
    "set use_shared_memory: false or a smaller prefetch_factor.",
}
_OTHER_HINT = "With num_workers: 0 the same happens in the training process, where a debugger can look at it."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "without a name"


def _stop(iterator: Any, started: float) -> None:
    """End the workers in every case, also those that are stuck, and remove what they shared.

    Paddle's own way waits for each without a limit, and reads their queue to its end, where a killed worker may have
    left half a message. It is taken only by Paddle itself, after the last batch.
    """
    if iterator._shutdown:
        return
    iterator._workers_done_event.set()
    iterator._exit_thread_expectedly()
    iterator._shutdown = True
    for worker in iterator._workers:
        worker.terminate()
    deadline = time.monotonic() + _SECONDS_TO_END
    for worker in iterator._workers:
        worker.join(max(deadline - time.monotonic(), 0))
        if worker.exitcode is None:
            worker.kill()
            worker.join()
        _remove_shared(worker.pid, started)
    for queue in iterator._indices_queues:
        queue.cancel_join_thread()
        queue.close()


def _remove_shared(pid: int, since: float) -> bool:
    """Remove from /dev/shm what the worker `pid` left, younger than `since` as numbers come again; True if anything."""
    found = False
    for name in glob.glob(f"/dev/shm/paddle_{pid}_*"):
        with contextlib.suppress(OSError):
            if os.stat(name).st_mtime >= since - 1:
                os.unlink(name)
                found = True
    return found


class _Progress:
    """What each worker is doing, in memory that the processes share: (state, epoch, index)."""

    _NOTHING, _LOADING, _DONE = 0, 1, 2

    def __init__(self, num_workers: int) -> None:
        self._rows = np.frombuffer(mmap.mmap(-1, num_workers * 24), np.int64).reshape(num_workers, 3)

    def entering(self, epoch: int, index: int) -> None:
        """Called in the worker, before each sample."""
        self._rows[paddle.io.get_worker_info().id] = self._LOADING, epoch, index

    def leaving(self) -> None:
        """Called in the worker, after each batch."""
        self._rows[paddle.io.get_worker_info().id, 0] = self._DONE

    def where(self, worker: int, dataset: Samples) -> str:
        state, epoch, index = self._rows[worker].tolist()
        if state == self._NOTHING:
            return "before its first sample"
        when = "while loading" if state == self._LOADING else "after loading"
        return f"{when} sample {index} ({dataset.describe(index)}) in epoch {epoch}"


class _Batches:
    """What the workers index: a whole batch is one item, so that exceptions are caught in one place."""

    def __init__(self, load_batch: Callable[..., LoadedBatch], progress: _Progress) -> None:
        self.load_batch = load_batch
        self.progress = progress

    def __getitem__(self, batch: list[tuple[int, int]]) -> dict[str, Any]:
        while _ending.is_set():
            time.sleep(1)  # until the process is gone: nothing more is to be shared
        _use_one_thread_of_opencv()
        try:
            loaded = self.load_batch(batch, entering=self.progress.entering)
        except Exception as error:
            return _result(None, [], (_picklable(error), traceback.format_exc()))
        self.progress.leaving()
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


# --- in the worker: its signals and its threads ---

_TOLD_TO_END = 143  # as a shell says it of SIGTERM
_QUIET_ROUNDS, _ROUND = 3, 0.1  # seconds: longer than it takes to share the arrays of one batch
_ending = threading.Event()


def _prepare_worker(parent_pid: int, worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the main process, which ends the workers.
    # A handler in Python does not run when the signal comes just before the main thread begins to wait for work, and
    # this process would stay for ever. What always comes is the byte that Python writes in the signal's C handler.
    arrivals, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_end_when_told, args=(arrivals, time.time()), daemon=True).start()
    if not end_with(parent_pid, signal.SIGTERM):
        sys.exit(1)
    _use_one_thread()


def _end_when_told(arrivals: int, started: float) -> None:
    while signal.SIGTERM not in os.read(arrivals, 1):
        pass
    # The signal's default action would leave shared memory behind, and an orderly exit waits until all that this
    # worker made is read, which nobody may do any more. The batch in hand may still be shared meanwhile.
    _ending.set()
    paddle.base.core._cleanup_mmap_fds()
    quiet = 0
    while quiet < _QUIET_ROUNDS:
        quiet = 0 if _remove_shared(os.getpid(), started) else quiet + 1
        time.sleep(_ROUND)
    os._exit(_TOLD_TO_END)


def _use_one_thread() -> None:
    """The cores are divided among workers; threads inside each would only get into each other's way."""
    paddle.base.core.set_num_threads(1)
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        libraries = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if ".so" in line}
    for path in libraries:
        for part, setters in _THREAD_SETTERS:
            if part in os.path.basename(path):
                _call_first(path, setters, 1)


def _call_first(library: str, functions: tuple[str, ...], value: int) -> None:
    try:
        loaded = ctypes.CDLL(library)
    except OSError:  # replaced on the disk since it was loaded
        return
    for name in functions:
        if hasattr(loaded, name):
            getattr(loaded, name)(value)
            return


def _use_one_thread_of_opencv() -> None:
    # At each batch: a transform may import it at its first image.
    opencv = sys.modules.get("cv2")
    if opencv is not None:
        opencv.setNumThreads(1)
