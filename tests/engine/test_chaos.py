"""One pre-training of two processes that is killed again and again ends as if nothing had happened: `make chaos`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict

import pytest

from passl import checkpoint
from tests.engine import chaos_job, tiny

NUM_IMAGES, BATCH, EPOCHS, STEPS = 36, 3, 50, 300  # per process; 6 steps an epoch
SECONDS_TO_END, SECONDS_TO_OBEY = 120, 20


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path, train=NUM_IMAGES // 3)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    return tmp_path


def a_plan(rng: random.Random) -> dict:
    rank = rng.randrange(2)
    # Only the first process writes.
    moments = chaos_job.MOMENTS if rank == 0 else ("before a step", "after a step", "while loading")
    moment = rng.choice(moments)
    count = {"while loading": 1, "while writing": rng.randint(1, 6)}.get(moment, rng.randint(1, 12))
    whom = rng.choices(["me", "worker", "all"], [6, 1 if "step" in moment else 0, 2])[0]
    name = "SIGKILL" if whom == "worker" else rng.choices(["SIGKILL", "SIGTERM", "SIGINT"], [6, 2, 1])[0]
    return {"rank": rank, "moment": moment, "count": count, "whom": whom, "signal": name}


def attempt(folder, out, plan) -> list[int]:
    """Both processes from the newest checkpoint on; returns their exit codes."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        endpoints = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    record = folder / f"{out}.jsonl"
    command = [sys.executable, chaos_job.__file__, json.dumps(plan), str(record), "-c", str(folder / "pretrain.yaml")]
    command += tiny.overrides(
        Global__output_dir=folder / out, Global__checkpoint="auto", Global__epochs=EPOCHS, Global__save_interval="4it",
        DataLoader__Train__sampler__batch_size=BATCH, DataLoader__Train__loader__num_workers=1,
    )  # fmt: skip
    processes = []
    for rank in range(2):
        environment = tiny.process_environment(
            PADDLE_TRAINER_ID=str(rank), PADDLE_TRAINERS_NUM="2", PADDLE_TRAINER_ENDPOINTS=",".join(endpoints),
            PADDLE_CURRENT_ENDPOINT=endpoints[rank], PADDLE_LOCAL_SIZE="2", PADDLE_DISTRI_BACKEND="gloo",
        )  # fmt: skip
        with (folder / f"{out}.log").open("ab") as log:
            # A group of its own for both: "all" are those two and their workers.
            group = {"process_group": processes[0].pid if processes else 0} if sys.version_info >= (3, 11) else {}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, **group))
    return wait(processes)


def wait(processes) -> list[int]:
    """As a launcher does: when one ends badly the other is told to, and killed if it does not obey."""
    deadline = time.monotonic() + SECONDS_TO_END
    while all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline, "the job hangs"
        time.sleep(0.02)
    told = time.monotonic()
    while any(process.poll() is None for process in processes):
        waited = time.monotonic() - told
        for process in processes:
            if process.poll() is None and any(p.poll() for p in processes) and waited > 2:
                process.send_signal(signal.SIGKILL if waited > SECONDS_TO_OBEY else signal.SIGTERM)
        assert waited < SECONDS_TO_END, "a process stays"
        time.sleep(0.5)
    return [process.returncode for process in processes]


def samples_of_steps(folder, out) -> dict[tuple[int, int], list[int]]:
    """(step, rank) -> its samples, which are the same however often the step was done."""
    samples: dict[tuple[int, int], list[int]] = {}
    for line in (folder / f"{out}.jsonl").read_text().splitlines():
        row = json.loads(line)
        place = row["step"], row["rank"]
        assert samples.setdefault(place, row["indices"]) == row["indices"], "a repeated step sees the same samples"
    return samples


@pytest.mark.slow
def test_fifty_kills(folder):
    kills = int(os.environ.get("CHAOS_KILLS", "50"))
    rng = random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    assert attempt(folder, "whole", {}) == [0, 0], (folder / "whole.log").read_text()[-3000:]
    done, told, of_kind = 0, "", defaultdict(int)
    while done < kills:
        plan = a_plan(rng)
        codes = attempt(folder, "killed", plan)
        if codes == [0, 0]:
            break
        done += 1
        of_kind[plan["signal"], plan["moment"], plan["whom"]] += 1
        told += f"{plan} -> {codes}\n"
    assert done == kills, f"the run was over after {done} kills:\n{told}"
    codes = attempt(folder, "killed", {})
    assert codes == [0, 0], told + (folder / "killed.log").read_text()[-3000:]
    assert checkpoint.read_states(folder / "killed/DINO/latest")["step"] == STEPS
    tiny.assert_same_checkpoint(folder / "whole/DINO/latest", folder / "killed/DINO/latest")
    assert not list((folder / "killed").rglob("*.partial"))
    assert len({moment for _, moment, _ in of_kind}) >= min(5, kills // 3), dict(of_kind)

    samples = samples_of_steps(folder, "killed")
    assert samples == samples_of_steps(folder, "whole")
    for first in range(0, STEPS, STEPS // EPOCHS):
        steps = range(first, first + STEPS // EPOCHS)
        seen = sorted(index for step in steps for rank in range(2) for index in samples[step, rank])
        assert seen == list(range(NUM_IMAGES)), f"each sample once in the epoch from step {first} on"
    print(told)
