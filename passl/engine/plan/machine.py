"""Where the run is to happen: this CPU, GPUs of this machine, or GPUs elsewhere of which only the memory is known."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import paddle

from passl.engine.data_wait import available_cores
from passl.engine.plan.budget import GB, PlanError, shown_memory

_MEMINFO = Path("/proc/meminfo")
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass(frozen=True)
class Machine:
    """What a run has.

    Attributes:
        device: "cpu" or "gpu".
        processes: one for each GPU.
        memory: bytes for each process.
        cores: of the CPU, for each process; None for a machine that is not this one.
        is_here: whether short runs on this machine say how fast it is.
        dtype: of half precision; None: float32.
    """

    device: str
    processes: int
    memory: float
    cores: Optional[int]
    is_here: bool
    dtype: Optional[str] = None

    def __str__(self) -> str:
        if self.device == "cpu":
            return f"this CPU, {self.cores} core(s), {shown_memory(self.memory)} of memory"
        place = "here" if self.is_here else "elsewhere"
        return f"{self.processes} GPU(s) of {shown_memory(self.memory)} {place}"


def machine(
    gpus: Optional[int] = None, gpu_memory: Optional[float] = None, cpu: bool = False, memory: Optional[float] = None
) -> Machine:
    """The machine that options describe, or the one that is here.

    Args:
        gpus: how many; None: all that are here, or else the CPU.
        gpu_memory: GB of each; None: as those here have.
        cpu: this CPU, also where there are GPUs.
        memory: GB that the CPU's run may take; None: what is free.

    Raises:
        PlanError: numbers that make no sense, or GPUs elsewhere of unknown memory.
    """
    for name, value in (("--gpus", gpus), ("--gpu-memory", gpu_memory), ("--memory", memory)):
        if value is not None and not 0 < value < 1e6:
            raise PlanError(f"{name} {value:g} must be more than 0" if value <= 0 else f"{name} {value:g} is too much")
    here = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    cores = available_cores()
    if cpu or (gpus is None and gpu_memory is None and not here):
        if gpus is not None or gpu_memory is not None:
            raise PlanError("--cpu and --gpus / --gpu-memory exclude each other")
        free = _free_memory()
        return Machine("cpu", 1, min(free, memory * GB) if memory else free, cores, True)
    if memory is not None:
        raise PlanError("--memory is for --cpu: give --gpu-memory")
    gpus = gpus or here or 1
    if gpus <= here:
        own = float(paddle.device.cuda.get_device_properties(0).total_memory)
        # From compute capability 8.0 on GPUs have bfloat16, which cannot overflow.
        dtype = "bfloat16" if paddle.device.cuda.get_device_capability() >= (8, 0) else "float16"
        size = min(own, gpu_memory * GB) if gpu_memory else own
        return Machine("gpu", gpus, size, max(cores // gpus, 1), True, dtype)
    if gpu_memory is None:
        raise PlanError(f"--gpus {gpus}: this machine has {here}. Say how much memory each has: --gpu-memory 32")
    return Machine("gpu", gpus, gpu_memory * GB, None, False, "float16")


def _free_memory() -> float:
    """Bytes that a new process can have: of the machine, and of the container that this is."""
    free = []
    if _MEMINFO.is_file():
        rows = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        free.append(float(rows["MemAvailable"].split()[0]) * 1024)
    else:
        free.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    for limit, used in _LIMITS:
        if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdecimal():
            free.append(float(text) - float(used.read_text(encoding="ascii")) + _cached_files(limit.parent))
    return max(min(free), 0.0)


def _cached_files(folder: Path) -> float:
    """Bytes that count as used and are given up when needed."""
    stat = folder / "memory.stat"
    if not stat.is_file():
        return 0.0
    rows = dict(line.split(" ", 1) for line in stat.read_text(encoding="ascii").splitlines())
    return float(rows.get("inactive_file", 0))
