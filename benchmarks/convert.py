"""Converting an 85 M-parameter checkpoint with passl, beside torch.load and torch.save of the same file.

    python benchmarks/convert.py --torch-python /path/to/python/with/torch

The file: the backbone of ViT-B/16 with random weights, in float32 and bfloat16, as a zip archive and in the
serialisation before PyTorch 1.6, which only PyTorch writes.

Every measurement has a process of its own, and all take turns. Files are in the page cache. Of the repetitions the
medians are shown: seconds, and as a multiple of plain torch.load; and the largest resident memory (ru_maxrss, in which
pages of a mapped file count too) as a multiple of the file's size, of the whole process and of what came on top of the
imports. The command's seconds and memory have the start of Python and the import of Paddle in them. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Optional

ROOT = Path(__file__).resolve().parent.parent
COMMAND, FUNCTION, LOAD = "passl-convert", "passl.convert.convert", "torch.load"
ELEMENTS = ("float32", "bfloat16")
LIMIT = 2.5  # times the size of the file
MEGABYTE = 1e6
MEMORY = ("peak", "added")


# --- what the processes do: each returns the function to be measured -------------------------------------------------


def passl_convert(source: Path, target: Path) -> Callable[[], object]:
    import passl.models  # noqa: F401
    from passl.convert import convert

    return lambda: convert(source, target)


def torch_load(source: Path, target: Path) -> Callable[[], object]:
    import torch

    return lambda: torch.load(source, weights_only=True)


def torch_load_save(source: Path, target: Path, mmap: bool) -> Callable[[], object]:
    import torch

    return lambda: torch.save(torch.load(source, weights_only=True, mmap=mmap), target)


def make_zip(source: Path, target: Path) -> Callable[[], object]:
    import numpy as np

    from passl.convert import BFLOAT16, save_torch
    from passl.convert.layout import blueprint, slots
    from passl.models import vit_base

    random = np.random.default_rng(0)
    state = {}
    for slot in slots(blueprint(vit_base, {})):
        value = random.standard_normal(slot.torch_shape, np.float32)
        if target.stem.endswith("bfloat16"):
            value = (value.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
        state[slot.torch_name] = value
    return lambda: save_torch(state, target)


def make_legacy(source: Path, target: Path) -> Callable[[], object]:
    import torch

    return lambda: torch.save(torch.load(source), target, _use_new_zipfile_serialization=False)


PASSL = {FUNCTION: passl_convert, "make zip": make_zip}
TORCH = {
    LOAD: torch_load,
    "torch.load + save": functools.partial(torch_load_save, mmap=False),
    "torch.load mmap + save": functools.partial(torch_load_save, mmap=True),
    "make legacy": make_legacy,
}


def resident() -> float:
    """MB that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MEGABYTE


def work(task: str, source: Path, target: Path) -> None:
    """A process: one measurement, as a line of JSON on stdout."""
    measured = {**PASSL, **TORCH}[task](source, target)
    base, start = resident(), time.perf_counter()
    value = measured()  # kept, as whoever loads a file keeps it
    seconds = time.perf_counter() - start
    del value
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE
    print(json.dumps({"seconds": seconds, "peak": peak, "added": peak - base}))


# --- the parent: imports nothing large, because a child's ru_maxrss begins with that of its parent -------------------


def run(python: str, task: str, source: Path, target: Path) -> Optional[dict[str, float]]:
    """One measurement in a new process; None where it has not what it needs."""
    if task == COMMAND:
        return run_command(python, source, target)
    arguments = [python, "-W", "ignore", __file__, "--task", task, str(source), str(target)]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    if done.returncode:
        if "ModuleNotFoundError: No module named 'torch'" in done.stderr:
            return None
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_command(python: str, source: Path, target: Path) -> dict[str, float]:
    start = time.perf_counter()
    code = "from passl.cli.convert import convert_main; convert_main()"
    arguments = [python, "-W", "ignore", "-c", code, str(source), str(target)]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{COMMAND} failed on {source}")
    return {"seconds": time.perf_counter() - start, "peak": usage.ru_maxrss * 1024 / MEGABYTE}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def make_files(folder: Path, torch_python: str) -> list[Path]:
    files = []
    for element in ELEMENTS:
        files.append(folder / f"zip_{element}.pth")
        run(sys.executable, "make zip", folder, files[-1])
        legacy = folder / f"legacy_{element}.pth"
        if run(torch_python, "make legacy", files[-1], legacy):
            files.append(legacy)
    return files


def measure(files: list[Path], folder: Path, torch_python: str, repeat: int) -> dict[tuple[Path, str], list[dict]]:
    """(file, task) -> measurements; all rows take turns, so that they share the machine's weather."""
    tasks = {COMMAND: sys.executable, FUNCTION: sys.executable}
    tasks.update({task: torch_python for task in TORCH if not task.startswith("make")})
    rows: dict[tuple[Path, str], list[dict]] = {}
    for _ in range(repeat):
        for file in files:
            for task, python in tasks.items():
                if "mmap" in task and "legacy" in file.name:  # PyTorch maps zip archives only
                    continue
                result = run(python, task, file, folder / "written")
                if result:
                    rows.setdefault((file, task), []).append(result)
                for written in folder.glob("written*"):
                    written.unlink()
    return rows


def report(rows: dict[tuple[Path, str], list[dict]]) -> str:
    lines = [
        f"{'':<24}{'':>8}{'x torch':>8}{'peak':>8}{'/ file':>8}{'added':>8}{'/ file':>8}",
        f"{'':<24}{'seconds':>8}{'.load':>8}{'MB':>8}{'':>8}{'MB':>8}{'':>8}",
    ]
    medians = {
        row: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for row, measured in rows.items()
    }
    for file in dict.fromkeys(file for file, _ in rows):
        size = file.stat().st_size / MEGABYTE
        lines.append(f"{file.stem.replace('_', ', ')}, {size:.0f} MB")
        plain = medians.get((file, LOAD))
        for (of, task), median in medians.items():
            if of == file:
                times = f"{median['seconds'] / plain['seconds']:.1f}" if plain else "-"
                line = f"  {task:<22}{median['seconds']:>8.2f}{times:>8}"
                lines.append(
                    line + "".join(f"{median[k]:>8.0f}{median[k] / size:>8.2f}" for k in MEMORY if k in median)
                )
        whole, added = medians[file, COMMAND]["peak"] / size, medians[file, FUNCTION]["added"] / size
        imports = medians[file, FUNCTION]["peak"] - medians[file, FUNCTION]["added"]
        lines.append(
            f"  less than {LIMIT} x the file's size: {verdict(whole)} by the whole command ({whole:.2f}, of which "
            f"imports are {imports:.0f} MB), {verdict(added)} by the conversion itself ({added:.2f})"
        )
    return "\n".join(lines)


def verdict(times: float) -> str:
    return "kept" if times < LIMIT else "BROKEN"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch (default: this one)")
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each row (default: 5)")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task, source, target = arguments.task
        work(task, Path(source), Path(target))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), arguments.torch_python)
        print(report(measure(files, Path(folder), arguments.torch_python, arguments.repeat)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
