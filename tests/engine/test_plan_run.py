"""`passl-plan` as a user types it: trials, the plan, and the run of the plan beside what was estimated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from passl import checkpoint
from passl.engine.plan.budget import GB, PlanError, parse_time
from passl.engine.plan.probing import OutOfMemoryError, Prober
from passl.log import read_metrics
from tests.engine import tiny
from tests.engine.test_plan import write

PLAN = "from passl.cli import plan_main; plan_main()"


def plan(*arguments, cwd):
    return tiny.run(PLAN, *arguments, cwd=cwd)


@pytest.mark.slow
def test_a_plan_runs_and_takes_about_what_it_says(tmp_path):
    tiny.write_images(tmp_path, classes=3, train=20, val=4, size=32)
    done = plan(tmp_path / "train", "--cpu", "--time", "50s", "--out", "plan.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trial 1: ViT of 96 x 2 blocks" in done.stderr
    text = (tmp_path / "plan.yaml").read_text()
    assert "# prototypes: about one for ten images" in text
    seconds = parse_time(re.search(r"Time: about (.*) of 50 s", done.stdout)[1])
    memory = float(re.search(r"Memory: about ([\d.]+) GB", done.stdout)[1])
    assert seconds <= 0.9 * 50

    checked = tiny.run(tiny.TRAIN, "-c", "plan.yaml", "--check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    started = time.monotonic()
    trained = tiny.run(tiny.TRAIN, "-c", "plan.yaml", cwd=tmp_path)
    took = time.monotonic() - started
    assert trained.returncode == 0, trained.stderr
    # Loosely: other tests may have the cores meanwhile, or had them during the trial.
    assert seconds / 3 <= took <= seconds * 3
    used = max(float(number) for number in re.findall(r"max mem: ([\d.]+) GB", trained.stderr))
    assert memory / 1.5 <= used <= memory * 1.5
    folder = tmp_path / "output/plan/DINO"
    epochs = int(re.search(r"epochs: (\d+)", text)[1])
    assert checkpoint.read_states(folder / "latest")["epoch"] == epochs
    assert any("knn_top1_k20" in row for row in read_metrics(folder / "metrics.jsonl"))

    again = plan(tmp_path / "train", "--cpu", "--time", "50s", "--out", "plan.yaml", cwd=tmp_path)
    assert again.returncode == 1
    assert "plan.yaml is there already: give another --out, or --force to replace it" in again.stderr
    assert (tmp_path / "plan.yaml").read_text() == text


@pytest.mark.slow
def test_gpus_that_are_not_here(tmp_path):
    tiny.write_images(tmp_path, train=20)
    options = (tmp_path / "train", "--time", "1h", "--gpus", "2", "--gpu-memory")
    done = plan(*options, "16", "--out", "two.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python -m paddle.distributed.launch --devices 0,1 $(which passl-train) -c two.yaml" in done.stdout
    assert "Time: not known" in done.stdout
    assert re.search(r"Memory: about 0\.\d+ GB of 16 GB on each GPU. Not measured, but estimated", done.stdout)
    assert tiny.run(tiny.TRAIN, "-c", "two.yaml", "--check", cwd=tmp_path).returncode == 0
    small = plan(*options, "0.5", "--out", "small.yaml", cwd=tmp_path)
    assert small.returncode == 1
    assert "0.5 GB of memory are too little" in small.stderr
    assert not (tmp_path / "small.yaml").exists()


@pytest.mark.slow
def test_too_little_time_or_memory_says_what_would_do(tmp_path):
    for number in range(200):
        write(tmp_path / f"{number}.png", 96, 96, seed=number)
    done = plan(tmp_path, "--cpu", "--time", "9s", "--arch", "vit_base", "--out", "plan.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(
        r"error: 9 s is too short: one epoch of vit_base over 200 images takes by its operations \d+ min", done.stderr
    ), done.stderr
    assert re.search(r"What would do: --time \d+[smhd] for one epoch", done.stderr)
    assert "no --arch: the plan then takes a network that fits" in done.stderr
    done = plan(tmp_path, "--cpu", "--time", "9s", "--memory", "0.1", "--out", "plan.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "0.1 GB of memory are too little" in done.stderr
    assert not (tmp_path / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "0"], "time '0': write a number with a unit"),
        (["--time", "0s"], "time '0s' must be more than nothing"),
        (["--time", "1h", "--out", "plan.txt"], "--out plan.txt: a plan is a file that ends in .yaml"),
        (["--time", "1h", "--out", "/proc/nowhere/plan.yaml"], "nothing can be written to /proc/nowhere"),
        (["--time", "1h", "--gpus", "-1"], "--gpus -1 must be more than 0"),
    ],
)
def test_mistakes_are_told_before_any_trial(tmp_path, arguments, message, capsys, monkeypatch):
    from passl.cli import plan_main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        plan_main([str(tmp_path), *arguments])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.smoke
def test_help_shows_examples(capsys):
    from passl.cli import plan_main

    with pytest.raises(SystemExit):
        plan_main(["--help"])
    text = capsys.readouterr().out
    assert "passl-plan photos/ --time 12h" in text
    assert "--gpu-memory" in text


# --- trials ---

CONFIG = {"Global": {}}


def in_a_trial(monkeypatch, body):
    """Let trials do something else than train: they are processes of their own, so as code."""
    code = "import os, sys, time\n" + body
    monkeypatch.setattr("passl.engine.plan.probing.main", _Code(code))


class _Code:
    def __init__(self, code):
        self.code = code

    def __call__(self, trial, folder):
        (folder / "log.txt").write_text("last words\n")
        subprocess.run([sys.executable, "-c", self.code], check=False)
        if "kill" in self.code:
            os.kill(os.getpid(), 9)
        if "fail" in self.code:
            raise SystemExit(3)


def test_a_killed_trial_is_survived_and_named(tmp_path, monkeypatch):
    in_a_trial(monkeypatch, "'kill'")
    with pytest.raises(OutOfMemoryError, match="it was killed, as the system does when memory runs out"):
        Prober(tmp_path, None, print).run(CONFIG, 1, "a trial")


def test_a_failed_trial_shows_its_last_lines(tmp_path, monkeypatch):
    in_a_trial(monkeypatch, "'fail'")
    with pytest.raises(PlanError, match="a trial ended with code 3:\nlast words"):
        Prober(tmp_path, None, print).run(CONFIG, 1, "a trial")


def test_a_trial_that_takes_too_much_memory_is_ended(tmp_path, monkeypatch):
    in_a_trial(monkeypatch, "time.sleep(20)")
    started = time.monotonic()
    with pytest.raises(OutOfMemoryError, match="it took more than 0.001 GB and was ended"):
        Prober(tmp_path, 0.001 * GB, print).run(CONFIG, 1, "a trial")
    assert time.monotonic() - started < 15
