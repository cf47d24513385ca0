"""tools/slurm_train.sh with stand-ins for Slurm's commands, whose nodes are all this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from passl import checkpoint
from tests.engine import tiny

SCRIPT = tiny.ROOT / "tools" / "slurm_train.sh"

# Starts the command once for each node, each in a process group of its own, and returns the largest exit code. As the
# real one, it kills its tasks if it gets SIGTERM itself.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE/srun"
while [[ $1 == --* ]]; do case $1 in --export=*|--kill*) shift;; *) shift 2;; esac; done
set -m
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=("$!"); done
printf '%s ' "${pids[@]}" > "$FAKE/tasks.partial" && mv "$FAKE/tasks.partial" "$FAKE/tasks"
trap 'for pid in "${pids[@]}"; do kill -KILL -- "-$pid"; done' TERM
code=0
for pid in "${pids[@]}"; do wait "$pid"; result=$?; ((result > code)) && code=$result; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$FAKE/scontrol"
[[ $1 == requeue ]] || printf '127.0.0.1\\nnode2\\n'
"""
SCANCEL = """#!/usr/bin/env bash
echo "$@" > "$FAKE/scancel"
for pid in $(cat "$FAKE/tasks"); do kill -TERM -- "-$pid"; done
"""
# A run that shows how it was started, and saves when it is told to stop.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
here = Path(os.environ["FAKE"])
rank = os.environ["PADDLE_TRAINER_ID"]
def stop(*_):
    (here / f"saved{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
started = {"arguments": sys.argv[1:], "world_size": os.environ["PADDLE_TRAINERS_NUM"]}
(here / "partial").write_text(json.dumps(started))
(here / "partial").rename(here / f"started{rank}")
ending = os.environ["ENDING"]
if ending == "wait":
    time.sleep(100)
sys.exit(int(ending))
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job on two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "program.py").write_text(PROGRAM)
    kept = {name: value for name, value in tiny.process_environment().items() if not name.startswith("PADDLE_")}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    program = {"PASSL_TRAIN": str(tmp_path / "program.py"), "PYTHON": sys.executable}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**kept, **job, **program, "PATH": path, "FAKE": str(tmp_path), "ENDING": "0"}


def run(slurm, *arguments, **more):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, env={**slurm, **more}, cwd=slurm["FAKE"], capture_output=True, text=True, timeout=200
    )


def test_two_nodes_train_as_one_process_with_twice_the_batch(slurm, tmp_path):
    tiny.write_images(tmp_path, train=8)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    same = tiny.overrides(Global__max_train_step=2, Model__backbone__drop_path_rate=0)
    at_once = tiny.overrides(Global__output_dir=tmp_path / "one", DataLoader__Train__sampler__batch_size=8)
    one = tiny.run(tiny.TRAIN, "-c", tmp_path / "pretrain.yaml", *same, *at_once)
    assert one.returncode == 0, one.stderr
    arguments = ["-c", tmp_path / "pretrain.yaml", *same, *tiny.overrides(Global__output_dir=tmp_path / "two")]
    two = run(slurm, *arguments, PASSL_TRAIN=str(tiny.ROOT / "tools/train.py"), SLURM_CPUS_PER_TASK="2")
    assert two.returncode == 0, two.stdout + two.stderr
    assert "slurm_train.sh: finished" in two.stdout
    assert "on 2 process(es)" in (tmp_path / "two/DINO/train.log").read_text()
    tiny.assert_close_runs(tmp_path / "one/DINO", tmp_path / "two/DINO")
    assert (tmp_path / "scontrol").read_text() == "show hostnames node[1-2]\n"
    options = (tmp_path / "srun").read_text().split("\n")
    assert options[options.index("--cpus-per-task") + 1] == "2"


def test_an_interrupted_run_saves_and_goes_back_to_the_queue(slurm, tmp_path):
    with open(tmp_path / "output", "w") as output:
        job = subprocess.Popen(["bash", str(SCRIPT), "-c", "a b.yaml", "-o", "Global.checkpoint=null"],
                               env={**slurm, "ENDING": "wait"}, cwd=tmp_path, stdout=output, stderr=output)  # fmt: skip
        deadline = time.monotonic() + 100
        while not all((tmp_path / f"started{rank}").exists() for rank in range(2)):
            assert job.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        job.send_signal(signal.SIGTERM)
        code = job.wait(timeout=100)
    assert code == 75, (tmp_path / "output").read_text()
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2))
    assert (tmp_path / "scancel").read_text() == f"--signal=TERM {slurm['SLURM_JOB_ID']}\n"
    assert (tmp_path / "scontrol").read_text().splitlines()[1:] == [f"requeue {slurm['SLURM_JOB_ID']}"]
    started = json.loads((tmp_path / "started1").read_text())
    # The last word on the checkpoint is the script's.
    assert started["arguments"] == ["-c", "a b.yaml", "-o", "Global.checkpoint=null", "-o", "Global.checkpoint=auto"]


@pytest.mark.slow
def test_a_preempted_run_ends_as_the_undisturbed_one(slurm, tmp_path):
    """Two nodes, shares of the optimizer's state, told to stop in the middle, started again as Slurm would."""
    tiny.write_images(tmp_path, train=8)
    config = tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    options = tiny.overrides(Global__epochs=40, Global__save_interval="1000it", DistributedStrategy__sharding="true")
    train = {**slurm, "PASSL_TRAIN": str(tiny.ROOT / "tools/train.py")}
    whole = run(train, "-c", config, *options, *tiny.overrides(Global__output_dir=tmp_path / "whole"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    arguments = ["-c", str(config), *options, *tiny.overrides(Global__output_dir=tmp_path / "stopped")]
    job = subprocess.Popen(["bash", str(SCRIPT), *arguments], env=train, cwd=tmp_path)
    metrics = tmp_path / "stopped/DINO/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 10:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=100) == 75
    step = checkpoint.read_states(tmp_path / "stopped/DINO/latest")["step"]
    assert 10 <= step < 120
    again = run(train, *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"at step {step}" in (tmp_path / "stopped/DINO/train.log").read_text() + again.stdout + again.stderr
    tiny.assert_same_checkpoint(tmp_path / "whole/DINO/latest", tmp_path / "stopped/DINO/latest")


@pytest.mark.parametrize(
    ("gpus", "processes"), [({"SLURM_GPUS_ON_NODE": "2"}, "2"), ({"SLURM_GPUS_PER_NODE": "a100:3"}, "3"), ({}, "1")]
)
def test_one_process_per_gpu_of_one_node(slurm, tmp_path, gpus, processes):
    done = run(slurm, "-c", "x.yaml", SLURM_NNODES="1", **gpus)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "started0").read_text())["world_size"] == processes


def test_a_failed_run_is_not_repeated(slurm, tmp_path):
    done = run(slurm, "-c", "x.yaml", SLURM_NNODES="1", ENDING="3")
    assert done.returncode not in (0, 75)
    assert "slurm_train.sh: failed with code" in done.stderr
    assert not (tmp_path / "scontrol").exists()


def test_usage_and_errors(slurm):
    help_text = run(slurm, "--help")
    assert help_text.returncode == 0
    assert "usage: sbatch --nodes N" in help_text.stdout
    nothing = run(slurm)
    assert (nothing.returncode, nothing.stderr) == (2, help_text.stdout)
    outside = {name: value for name, value in slurm.items() if name != "SLURM_JOB_ID"}
    done = run(outside, "-c", "x.yaml")
    assert done.returncode == 2
    assert "not in a Slurm job: start it with sbatch" in done.stderr
    done = run(slurm, "-c", "x.yaml", PASSL_TRAIN="/nowhere/train.py")
    assert "no passl-train on PATH and no /nowhere/train.py" in done.stderr


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
