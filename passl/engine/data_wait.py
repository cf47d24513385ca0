"""Whether training waits for its data, and what to change then."""

from __future__ import annotations

import logging
import os
from typing import Any

from passl.data.loader import Loader

logger = logging.getLogger("passl")

_STARTING = 5  # steps in which workers start and caches fill
_STEPS = 20  # that a verdict needs
_SHARE = 0.2  # of the time: what is below costs less than looking for it


class DataWait:
    """The share of the time that steps wait for their batch; warns once when it is large for many steps. The first
    steps, in which workers start, are not judged.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._waited = 0.0
        self._total = 0.0
        self._judged = 0
        self._warned = False
        self._epoch_waited = 0.0
        self._epoch_total = 0.0

    def update(self, waited: float, total: float) -> None:
        """One step of ``total`` seconds, of which it waited ``waited`` for its batch."""
        self._epoch_waited += waited
        self._epoch_total += total
        self._seen += 1
        if self._seen > _STARTING:
            self._judged += 1
            self._waited += waited
            self._total += total

    def judge(self, loader: Loader) -> None:
        """Warn, once a run, when the steps since the last verdict waited for more than a fifth of their time."""
        if self._judged < _STEPS:
            return
        share, steps = self._waited / max(self._total, 1e-9), self._judged
        self._judged, self._waited, self._total = 0, 0.0, 0.0
        if share > _SHARE and not self._warned:
            self._warned = True
            logger.warning(
                "data-bound: %.0f %% of the last %d steps went by waiting for images. %s",
                100 * share, steps, advice(loader, _cores()),
            )  # fmt: skip

    def epoch_share(self) -> float:
        """Of the epoch that ends; the next one begins."""
        share = self._epoch_waited / max(self._epoch_total, 1e-9)
        self._epoch_waited = self._epoch_total = 0.0
        return share


def advice(loader: Loader, cores: int) -> str:
    """The settings to change, with their present values, for a machine of ``cores``."""
    workers = loader.num_workers
    if workers == 0:
        return (
            "They are loaded in the training process: set DataLoader.Train.loader.num_workers, for example "
            f"-o DataLoader.Train.loader.num_workers={max(cores - 1, 1)} (this machine has {cores} cores)"
        )
    parts = []
    if workers < cores:
        more = min(max(2 * workers, 2), cores)
        parts.append(
            f"More workers: -o DataLoader.Train.loader.num_workers={more} (now {workers} for each process; this "
            f"machine has {cores} cores)"
        )
    else:
        parts.append(f"There are as many workers ({workers} for each process) as this machine has cores ({cores})")
    if _backend(loader) == "pillow":
        parts.append("a faster back end: -o DataLoader.Train.dataset.transform.backend=opencv")
    parts.append(
        "otherwise smaller stored images (a shorter side of 500 pixels serves crops of 224), a local disk or a tarball "
        "(passl-data tar-index) in place of a network folder, or fewer num_local_crops"
    )
    return "; ".join(parts)


def _backend(loader: Loader) -> Any:
    return getattr(getattr(loader.dataset, "transform", None), "backend_name", None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
