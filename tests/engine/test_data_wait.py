"""The verdict on runs that wait for their data: given once, with the setting to change; silent for others."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest

from passl.data.multi_crop import MultiCrop
from passl.engine.data_wait import DataWait, advice
from passl.log import read_metrics
from tests.engine import tiny

SLOW = """
import time
from passl.data.multi_crop import MultiCrop
fast = MultiCrop.__call__
def slow(self, *arguments):
    time.sleep(0.02)
    return fast(self, *arguments)
MultiCrop.__call__ = slow
"""


def loader(num_workers: int, backend: str = "opencv") -> SimpleNamespace:
    dataset = SimpleNamespace(transform=MultiCrop(8, 8, backend=backend))
    return SimpleNamespace(num_workers=num_workers, dataset=dataset)


@pytest.mark.smoke
def test_advice_names_the_setting_its_value_and_the_next_one():
    assert "loader.num_workers=7 (this machine has 8 cores)" in advice(loader(0), 8)
    assert "loader.num_workers=4 (now 2 for each process; this machine has 8 cores)" in advice(loader(2), 8)
    assert "loader.num_workers=8 (now 6" in advice(loader(6), 8)
    assert "as many workers (8 for each process)" in advice(loader(8), 8)
    assert "transform.backend=opencv" in advice(loader(2, "pillow"), 8)
    assert "backend" not in advice(loader(2), 8)


def test_a_verdict_needs_many_steps_after_the_start(caplog):
    with caplog.at_level(logging.WARNING, "passl"):
        wait = DataWait()
        for _ in range(5):  # workers start
            wait.update(9.0, 10.0)
        for _ in range(100):
            wait.update(0.1, 1.0)
            wait.judge(loader(2))
        assert caplog.text == ""
        for _ in range(19):
            wait.update(0.9, 1.0)
            wait.judge(loader(2))
        assert caplog.text == ""
        for _ in range(200):
            wait.update(0.9, 1.0)
            wait.judge(loader(2))
    assert caplog.text.count("data-bound: 90 % of the last 20 steps") == 1
    assert wait.epoch_share() == pytest.approx((45 + 10 + 219 * 0.9) / (50 + 100 + 219))
    assert wait.epoch_share() == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_with_slow_images_is_told(tmp_path, num_workers):
    tiny.write_images(tmp_path)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "run.yaml")
    run = tiny.run(
        SLOW + tiny.TRAIN, "-c", tmp_path / "run.yaml",
        *tiny.overrides(Global__epochs=12, DataLoader__Train__loader__num_workers=num_workers),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr.count("data-bound: ") == 1
    assert "DataLoader.Train.loader.num_workers=" in run.stderr or "as many workers" in run.stderr
    lines = [line for line in read_metrics(tmp_path / "out/DINO/metrics.jsonl") if line["phase"] == "train"]
    assert lines[-1]["data_wait"] > 0.2
    assert "[Train][Epoch 12/12][Avg] loss: " in run.stderr
    assert "waiting for data: " in run.stderr


def test_a_fast_run_is_not(tmp_path):
    started = time.perf_counter()
    tiny.write_images(tmp_path)
    config = tiny.PRETRAIN.replace("img_size: 16,", "img_size: 16, mlp_ratio: 600,")  # work for the network
    tiny.write_config(tmp_path, config, "run.yaml")
    run = tiny.run(
        tiny.TRAIN, "-c", tmp_path / "run.yaml",
        *tiny.overrides(Global__epochs=12, DataLoader__Train__loader__num_workers=1),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "data-bound" not in run.stderr
    assert time.perf_counter() - started < 300
