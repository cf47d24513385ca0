"""Whether training waits for its data, and which setting would change that."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Iterable

from passl import distributed
from passl.data.loader import Loader

_THRESHOLD = 0.2  # share of the time; below it, faster loading gains little
_MIN_STEPS = 10


class DataWait:
    """Adds up the time spent waiting for batches, and says once when it is too much.

    Waiting is judged over at least ten steps, and two for each worker as these deliver in bursts. The first steps do
    not count: workers start, and nothing is prepared in advance yet.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._first_steps = 1 + loader.num_workers
        self._recent: deque[tuple[float, float]] = deque(maxlen=max(_MIN_STEPS, 2 * loader.num_workers))
        self._line = self._epoch = (0.0, 0.0)
        self._is_told = False

    def add(self, waited: float, seconds: float) -> None:
        """One step of ``seconds``, of which ``waited`` passed before its batch came."""
        self._line = _sum([self._line, (waited, seconds)])
        self._epoch = _sum([self._epoch, (waited, seconds)])
        if self._first_steps:
            self._first_steps -= 1
        else:
            self._recent.append((waited, seconds))

    def shares(self) -> list[float]:
        """Shares of the time, between 0 and 1, that this process waited: since the last call, in the recent steps (0
        while there are too few) and in this epoch.
        """
        is_long_enough = len(self._recent) == self._recent.maxlen
        shares = [_share(self._line), _share(_sum(self._recent)) if is_long_enough else 0.0, _share(self._epoch)]
        self._line = (0.0, 0.0)
        return shares

    def end_epoch(self) -> None:
        self._epoch = (0.0, 0.0)

    def verdict(self, share: float, num_local_processes: int) -> str:
        """What to tell the user when ``share`` of the recent time was spent waiting, by the slowest process; "" if
        there is nothing to tell, or it was told.
        """
        if self._is_told or share <= _THRESHOLD:
            return ""
        self._is_told = True
        cores = max(available_cores() // num_local_processes, 1)
        return f"training waits for data {100 * share:.0f} % of the time. {_advice(self.loader, cores)}"


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes() -> int:
    """How many processes of the job share this machine; to be called by all at the same time."""
    names = distributed.gather_objects(platform.node())
    return names.count(platform.node())


def _advice(loader: Loader, cores: int) -> str:
    workers = "DataLoader.Train.loader.num_workers"
    if loader.num_workers == 0:
        return (
            "Images are loaded in the training process itself, between the steps: set "
            f"{workers}={max(cores - 1, 1)} (now 0; cores for this process: {cores})"
        )
    if loader.num_workers < cores:
        return f"Set {workers}={cores} (now {loader.num_workers}; cores for this process: {cores})"
    advice = f"{workers}={loader.num_workers} uses all cores of this process ({cores}) already. "
    backend = getattr(getattr(loader.dataset, "transform", None), "backend", None)
    if "pillow" in type(backend).__name__.lower() or backend == "pillow":
        advice += "Set DataLoader.Train.dataset.transform.backend=opencv, which is several times faster. "
    return (
        f"{advice}If they are busy computing, store the images smaller or use more cores; if they wait for a disk, put "
        "the data on a local one or in a tarball, and set DataLoader.Train.loader.prefetch_factor="
        f"{2 * loader.prefetch_factor} (now {loader.prefetch_factor})"
    )


def _sum(times: Iterable[tuple[float, float]]) -> tuple[float, float]:
    waited, seconds = zip(*times)
    return sum(waited), sum(seconds)


def _share(times: tuple[float, float]) -> float:
    waited, seconds = times
    return waited / seconds if seconds else 0.0
