"""What a long run holds does not grow: memory, open files, shared memory, threads, processes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.engine import tiny

STEPS, EVERY = 5000, 100
WATCH = """
import gc, json, os, threading
from pathlib import Path
from passl.engine.hooks import LogHook
after_step = LogHook.after_step
def children():
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
def watch(self, trainer):
    after_step(self, trainer)
    if trainer.step % {every} == 0:
        pages = Path("/proc/self/statm").read_text().split()[1]
        workers = children()
        ours = [f"_{{pid}}_" for pid in (os.getpid(), *workers)]
        shared = [name for name in os.listdir("/dev/shm") if any(pid in name for pid in ours)]
        row = {{
            "megabytes": int(pages) * os.sysconf("SC_PAGESIZE") / 2**20, "files": len(os.listdir("/proc/self/fd")),
            "shared": len(shared), "threads": threading.active_count(), "processes": len(workers),
            "worker_megabytes": sum(int(Path(f"/proc/{{pid}}/statm").read_text().split()[1]) for pid in workers)
                * os.sysconf("SC_PAGESIZE") / 2**20,
        }}
        with open({record!r}, "a") as file:
            file.write(json.dumps(row) + "\\n")
LogHook.after_step = watch
"""


@pytest.mark.slow
def test_five_thousand_steps(tmp_path):
    """With everything that a run does beside its steps: saving, evaluating, logging, curves, two data workers."""
    tiny.write_images(tmp_path, train=20)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    knn = (
        "[{name: KNN, k: [3], train_dataset: &data {name: ImageFolder, root: ROOT, transform: "
        "[Resize: {size: 18}, CenterCrop: {size: 16}, ToTensor: {}, Normalize: {}]}, val_dataset: *data}]"
    )
    record = tmp_path / "record.jsonl"
    options = tiny.overrides(
        Global__epochs=400, Global__max_train_step=STEPS, Global__save_interval="250it", Global__eval_interval="1000it",
        Global__use_visualdl="true", DataLoader__Train__loader__num_workers=2, Schedules__lr__base=0.005,
        Evaluators=knn.replace("ROOT", str(tmp_path / "val")),
    )  # fmt: skip
    code = WATCH.format(every=EVERY, record=str(record)) + tiny.TRAIN
    done = tiny.run(code, "-c", tmp_path / "pretrain.yaml", *options, seconds=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(rows) == STEPS // EVERY
    settled = rows[len(rows) // 5 :]
    thousands = np.arange(len(settled)) * EVERY / 1000
    slopes = {key: np.polyfit(thousands, [row[key] for row in settled], 1)[0] for key in rows[0]}
    print(rows[0], settled[0], rows[-1], slopes)
    assert slopes["megabytes"] < 1, f"MB per thousand steps: {slopes}"
    assert slopes["worker_megabytes"] < 1, f"MB per thousand steps: {slopes}"
    for key in ("threads", "processes"):
        assert {row[key] for row in settled} == {settled[0][key]}, f"{key} per thousand steps: {slopes}"
    # One more while a batch is handed over.
    assert max(row["files"] for row in settled) <= min(row["files"] for row in settled) + 2, slopes
    assert max(row["shared"] for row in rows) <= 12, "three arrays of at most two batches of two workers"
