"""A run that is told to stop saves at the next step, says so by its exit code, and is resumed to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from passl import checkpoint
from passl.engine.interruption import StopSignals
from passl.log import read_metrics
from tests.engine import tiny
from tests.engine.test_distributed import TOOL, start

INTERRUPTED = 75
SIGNALLED_AT = """
import os, signal
from passl.engine.hooks import LogHook
after_step = LogHook.after_step
def tell(self, trainer):
    after_step(self, trainer)
    if trainer.step == {step}:
        for _ in range({times}):
            os.kill(os.getpid(), signal.{signal})
LogHook.after_step = tell
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruption")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    return folder


def train(folder, out, *more, told="", workers=0):
    options = tiny.overrides(Global__output_dir=folder / out, DataLoader__Train__loader__num_workers=workers)
    return tiny.run(told + tiny.TRAIN, "-c", folder / "pretrain.yaml", *options, *more)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    done = train(folder, "whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole/DINO/latest"


@pytest.mark.parametrize(("name", "times", "workers"), [("SIGTERM", 3, 2), ("SIGINT", 1, 0)])
@pytest.mark.smoke
def test_a_signal_saves_at_the_next_step(folder, uninterrupted, name, times, workers):
    told = SIGNALLED_AT.format(step=4, times=times, signal=name)  # checkpoints are due at even steps
    stopped = train(folder, name, told=told, workers=workers)
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert "told to stop after step 5" in stopped.stderr
    assert "Global.checkpoint=auto" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert checkpoint.read_states(folder / name / "DINO/latest")["step"] == 5
    resumed = train(folder, name, "-o", "Global.checkpoint=auto", workers=workers)
    assert resumed.returncode == 0, resumed.stderr
    tiny.assert_same_checkpoint(uninterrupted, folder / name / "DINO/latest")


def test_a_second_ctrl_c_does_not_wait(folder):
    killed = train(folder, "twice", told=SIGNALLED_AT.format(step=4, times=2, signal="SIGINT"))
    assert killed.returncode == -signal.SIGINT, "a shell sees 130, and ends a loop around it"
    assert "KeyboardInterrupt" in killed.stderr


def test_signals_keep_their_meaning_outside_of_a_run():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_evaluation_that_was_due_is_made_up_for(folder):
    """The first save is what counts when there are seconds left; the measurement comes with the next start."""
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    command = ["-c", folder / "probe.yaml"]
    whole = tiny.run(tiny.TRAIN, *command, *tiny.overrides(Global__output_dir=folder / "probe_whole"))
    assert whole.returncode == 0, whole.stderr
    options = tiny.overrides(Global__output_dir=folder / "probe_told")
    for step in (2, 5):  # evaluation is due after the steps 3 and 6, the last one
        told = SIGNALLED_AT.format(step=step, times=1, signal="SIGTERM")
        stopped = tiny.run(told + tiny.TRAIN, *command, *options, "-o", "Global.checkpoint=auto")
        assert stopped.returncode == INTERRUPTED, stopped.stderr
        assert "[Eval]" not in stopped.stderr.split(f"[Iter: {step % 3}/3]")[-1]
    resumed = tiny.run(tiny.TRAIN, *command, *options, "-o", "Global.checkpoint=auto")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("latest", "best"):
        tiny.assert_same_checkpoint(folder / "probe_whole/LinearProbe" / name, folder / "probe_told/LinearProbe" / name)
    rows = [
        [
            (row["step"], row["top1"])
            for row in read_metrics(folder / out / "LinearProbe/metrics.jsonl")
            if row["phase"] == "eval"
        ]
        for out in ("probe_whole", "probe_told")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2


GUARDED = """
Global:
  early_stopping: {{tune_every: 1, patience: 2, min_epoch: 0}}
  guard: {{metric: drift, every: 2it, max_drift: 0.005, max_rollbacks: 1}}
Evaluators:
  - name: KNN
    k: [3, 20]
    models: [teacher, student]
    train_dataset: {{name: ImageFolder, root: {folder}/train, transform: &eval [Resize: {{size: 16}}, ToTensor: ]}}
    val_dataset: {{name: ImageFolder, root: {folder}/val, transform: *eval}}
"""


def test_the_guard_sees_what_is_made_up_for(folder):
    """Early stopping finds its best after step 3, the guard takes it back; told to stop there, too, and resumed."""
    (folder / "guarded.yaml").write_text(f"_base_: pretrain.yaml\n{GUARDED.format(folder=folder)}")
    command = ["-c", folder / "guarded.yaml", "-o", "Global.checkpoint=auto"]
    for out, told in (("seen", ""), ("unseen", SIGNALLED_AT.format(step=2, times=1, signal="SIGTERM")), ("unseen", "")):
        done = tiny.run(told + tiny.TRAIN, *command, *tiny.overrides(Global__output_dir=folder / out))
        assert done.returncode == (INTERRUPTED if told else 0), done.stderr
    assert "[Guard] the checkpoint best stays that of step 0" in done.stderr
    for name in ("latest", "best"):
        tiny.assert_same_checkpoint(folder / "seen/DINO" / name, folder / "unseen/DINO" / name)


def two_processes(folder, out, *more):
    options = tiny.overrides(
        Global__output_dir=folder / out, Global__epochs=400, Global__max_train_step=400, Global__save_interval="400it",
        Global__checkpoint="auto", DataLoader__Train__sampler__batch_size=2,
    )  # fmt: skip
    return start(folder, TOOL, "-c", folder / "pretrain.yaml", *options, *more)


def wait_for_step(run, step, job):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.poll() is None:
        if any(row["step"] >= step for row in read_metrics(run / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {job.communicate()[0]}")


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_all_processes_stop_together_with_their_launcher(folder, end):
    """Told to end it tells them; killed it cannot, and the system does."""
    run = folder / f"launched_{end}/DINO"
    job = two_processes(folder, f"launched_{end}")
    wait_for_step(run, 3, job)
    getattr(job, end)()
    job.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while (run.with_name("DINO.lock")).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    states = checkpoint.read_states(run / "latest")
    assert 3 <= states["step"] < 400, "saved although no checkpoint was due"
    assert not run.with_name("DINO.lock").exists()
    for number in range(2):
        log = "".join(path.read_text(errors="replace") for path in (folder / "launch").rglob(f"workerlog.{number}"))
        assert f"told to stop after step {states['step']}; everything is saved in {run / 'latest'}." in log


def test_one_killed_process_ends_the_job(folder):
    """It cannot save; the others end, and the last checkpoint is whole."""
    run = folder / "one_killed/DINO"
    job = two_processes(folder, "one_killed", "-o", "Global.save_interval=2it")
    wait_for_step(run, 4, job)
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listing.stdout.split()[-1]), signal.SIGKILL)
    output = job.communicate(timeout=60)[0]
    assert job.returncode != 0, output
    assert checkpoint.read_states(run / "latest")["step"] >= 2


WORKER_KILLED_AT = """
import os, signal
from pathlib import Path
from passl.engine.hooks import LogHook
after_step = LogHook.after_step
def kill(self, trainer):
    after_step(self, trainer)
    if trainer.step == 5:
        for task in Path("/proc/self/task").iterdir():
            for pid in (task / "children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
LogHook.after_step = kill
"""


def test_a_killed_data_worker_costs_no_step(folder, uninterrupted):
    killed = train(folder, "worker", told=WORKER_KILLED_AT, workers=2)
    assert killed.returncode == 1, killed.stderr
    assert "was killed by signal 9 (SIGKILL)" in killed.stderr
    saved = int(killed.stderr.split("the steps up to ")[1].split()[0])
    assert saved >= 5, "no checkpoint was due there"
    resumed = train(folder, "worker", "-o", "Global.checkpoint=auto", workers=2)
    assert resumed.returncode == 0, resumed.stderr
    assert f"at step {saved}" in resumed.stderr
    tiny.assert_same_checkpoint(uninterrupted, folder / "worker/DINO/latest")
