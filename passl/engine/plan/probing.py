"""Runs trials, one process each, and watches over their memory."""

from __future__ import annotations

import copy
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from passl.engine.plan.budget import PlanError, shown_memory
from passl.engine.plan.trial import Trial, main, memory_of

_PATIENCE = 900.0  # seconds; a trial takes less than a minute where nothing is wrong
_KILLED = -9
_SHOWN_LINES = 12


class OutOfMemoryError(PlanError):
    """A trial needed more memory than there is."""


class Prober:
    """Runs trials in ``folder``.

    Args:
        limit: bytes of RAM that a trial may take; None: what there is.
        say: shows a line of progress.
    """

    def __init__(self, folder: Path, limit: Optional[float], say: Callable[[str], None]) -> None:
        self.folder = folder
        self.limit = limit
        self.say = say
        self.count = 0

    def run(self, config: dict[str, Any], steps: int, what: str, counts: bool = False) -> dict[str, Any]:
        """The result of a trial, see trial.py.

        Raises:
            OutOfMemoryError: it was killed by the system, or took more than ``limit``.
            PlanError: it failed otherwise, or does not come to an end.
        """
        self.count += 1
        config = copy.deepcopy(config)
        # One output folder for all: the index of the images is kept in it.
        config["Global"].update(output_dir=str(self.folder / "out"), name=f"trial{self.count}")
        own = self.folder / f"trial{self.count}"
        own.mkdir()
        self.say(f"trial {self.count}: {what}")
        started = time.time()
        trial = Trial(config, steps, counts, started)
        process = multiprocessing.get_context("spawn").Process(target=main, args=(trial, own))
        process.start()
        metrics = self.folder / "out" / config["Global"]["name"] / "metrics.jsonl"
        try:
            self._watch(process, metrics, steps, started)
        finally:
            if process.is_alive():
                process.kill()
            process.join()
        return self._result(process, own)

    def _watch(self, process: Any, metrics: Path, steps: int, started: float) -> None:
        with tqdm(total=steps, unit="step", leave=False, disable=None) as bar:
            while process.is_alive():
                process.join(0.1)
                if metrics.is_file():
                    bar.update(metrics.read_bytes().count(b"\n") - bar.n)
                used = memory_of(process.pid)
                if self.limit is not None and used is not None and used > self.limit:
                    raise OutOfMemoryError(f"it took more than {shown_memory(self.limit)} and was ended")
                if time.time() - started > _PATIENCE:
                    raise PlanError(f"a trial of {steps} steps did not end within {_PATIENCE:.0f} s")

    def _result(self, process: Any, own: Path) -> dict[str, Any]:
        result = own / "result.json"
        if process.exitcode == _KILLED:
            raise OutOfMemoryError("it was killed, as the system does when memory runs out")
        lines = (own / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        if process.exitcode != 0 or not result.is_file():
            raise PlanError("\n".join([f"a trial ended with code {process.exitcode}:", *lines[-_SHOWN_LINES:]]))
        found = json.loads(result.read_text(encoding="utf-8"))
        if "error" not in found:
            return found
        if "ResourceExhausted" in found["error"] or "MemoryError" in found["error"]:
            raise OutOfMemoryError(f"memory ran out ({found['error'].splitlines()[0][:200]})")
        raise PlanError(f"a trial of the plan failed: {found['error']}")
