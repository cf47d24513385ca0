"""Runs that wait for their data are told so once, with the setting to change; others are not."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from passl import log
from passl.engine import data_wait
from passl.engine.data_wait import DataWait
from tests.engine import tiny

PLUGIN = """
import os, sys, time
from passl.registry import TRANSFORMS
from passl.data.multi_crop import MultiCrop

@TRANSFORMS.register()
class Slow:
    def __init__(self, seconds: float = 0.05):
        self.seconds = seconds
    def __call__(self, image, rng):
        time.sleep(self.seconds)
        return image

@TRANSFORMS.register()
class Deadly:
    def __init__(self, signal: int = 9):
        self.signal = signal
        self.count = 0
    def __call__(self, image, rng):
        self.count += 1
        if self.count == 6:
            time.sleep(0.3)
            os.kill(os.getpid(), self.signal)
        return image
"""


def loader(num_workers: int = 0, prefetch_factor: int = 2, backend: object = None) -> SimpleNamespace:
    dataset = SimpleNamespace(transform=SimpleNamespace(backend=backend))
    return SimpleNamespace(num_workers=num_workers, prefetch_factor=prefetch_factor, dataset=dataset)


def recent_share(wait: DataWait, steps: int, waited: float) -> float:
    for _ in range(steps):
        wait.add(waited, 1.0)
    return wait.shares()[1]


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_wait, "available_cores", lambda: 8)


def test_the_first_steps_do_not_count() -> None:
    wait = DataWait(loader(num_workers=4))
    assert recent_share(wait, 5, waited=1.0) == 0
    assert recent_share(wait, 10, waited=0.1) == pytest.approx(0.1)


def test_too_few_steps_say_nothing() -> None:
    wait = DataWait(loader(num_workers=20))
    assert recent_share(wait, 21 + 39, waited=0.9) == 0
    assert recent_share(wait, 1, waited=0.9) == pytest.approx(0.9)


def test_shares_of_line_and_epoch() -> None:
    wait = DataWait(loader())
    wait.add(1.0, 2.0)
    assert wait.shares() == [0.5, 0, 0.5]
    wait.add(0.0, 2.0)
    assert wait.shares() == [0, 0, 0.25]
    wait.end_epoch()
    wait.add(2.0, 2.0)
    assert wait.shares() == [1, 0, 1]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "processes", "texts"),
    [
        ({}, 1, ["in the training process itself", "num_workers=7 (now 0; cores for this process: 8)"]),
        ({"num_workers": 3}, 1, ["num_workers=8 (now 3; cores for this process: 8)"]),
        ({"num_workers": 1}, 4, ["num_workers=2 (now 1; cores for this process: 2)"]),
        ({"num_workers": 8}, 1, ["uses all cores of this process (8)", "prefetch_factor=4 (now 2)", "tarball"]),
        ({"num_workers": 8, "backend": "pillow"}, 1, ["transform.backend=opencv"]),
    ],
)
def test_the_verdict_names_the_setting(eight_cores, arguments: dict, processes: int, texts: list[str]) -> None:
    wait = DataWait(loader(**arguments))
    assert wait.verdict(0.2, processes) == ""
    text = wait.verdict(0.63, processes)
    assert text.startswith("training waits for data 63 % of the time.")
    assert all(part in text for part in texts), text
    assert wait.verdict(0.9, processes) == "", "it was told"


# --- in runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data_wait")
    tiny.write_images(folder, train=16)
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    (folder / "plugin.py").write_text(PLUGIN)
    return folder


def train(folder, out, first: str, **more: object):
    transform = f"[{first}RandomResizedCrop: {{size: 16}}, ToTensor: {{}}, Normalize: {{}}]"
    options = {
        "Global__output_dir": out,
        "Global__plugins": f"[{folder / 'plugin.py'}]",
        "Global__eval_during_train": "false",
        "DataLoader__Train__dataset__transform": transform,
        "DataLoader__Train__sampler__batch_size": 4,
        **more,
    }
    return tiny.run(tiny.TRAIN, "-c", folder / "probe.yaml", *tiny.overrides(**options))


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_slow_transform_is_told_once(folder, tmp_path, num_workers: int) -> None:
    done = train(
        folder,
        tmp_path,
        "Slow: {seconds: 0.05}, ",
        Global__epochs=3,
        DataLoader__Train__loader__num_workers=num_workers,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training waits for data") == 1
    rows = [row for row in log.read_metrics(tmp_path / "LinearProbe/metrics.jsonl") if row["phase"] == "train"]
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    assert rows[-1]["data_wait"] > 0.2
    summaries = re.findall(r"\[Train\]\[Epoch \d/3\]\[Avg\] .*data_wait: ([\d.]+)", done.stderr)
    assert len(summaries) == 3
    assert float(summaries[-1]) > 0.2


def test_a_fast_run_hears_nothing(folder, tmp_path) -> None:
    # The step is made slow, so that the worker is fast enough on every machine.
    slow_step = """
import time
from passl.engine.trainer import Trainer
train_step = Trainer.train_step
def slowly(self, batch):
    time.sleep(0.3)
    train_step(self, batch)
Trainer.train_step = slowly
"""
    (tmp_path / "slow_model.py").write_text(slow_step)
    done = train(
        folder, tmp_path, "", Global__epochs=2, DataLoader__Train__loader__num_workers=1,
        Global__plugins=f"[{tmp_path / 'slow_model.py'}]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training waits for data" not in done.stderr


@pytest.mark.parametrize("use_shared_memory", ["true", "false"])
def test_a_worker_that_dies_ends_the_run_with_one_message(folder, tmp_path, use_shared_memory: str) -> None:
    done = train(
        folder, tmp_path, "Deadly: {}, ",
        DataLoader__Train__loader=f"{{num_workers: 2, use_shared_memory: {use_shared_memory}, prefetch_factor: 3}}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "SystemError" not in done.stderr
    assert re.search(
        r"error: data-loading worker \d \(process \d+\) was killed by signal 9 \(SIGKILL\) while loading sample \d+ "
        r"\(.*\.png\) in epoch 0",
        done.stderr,
    ), done.stderr


@pytest.mark.slow
def test_the_list_of_files_is_kept_beside_the_runs(folder, tmp_path) -> None:
    for _ in range(2):
        done = train(folder, tmp_path, "", Global__max_train_step=1)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "file_index").glob("*.npz"))) == 1
    assert list(tmp_path.glob("LinearProbe.old*")), "the second run moved the first aside"
    done = train(folder, tmp_path / "refused", "", DataLoader__Train__loader="{num_workers: 1, prefetch_factor: 0}")
    assert done.returncode == 2
    assert "prefetch_factor (0) at least 1" in done.stderr
    assert not (tmp_path / "refused").exists()
