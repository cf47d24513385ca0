"""Wrapped models over several processes: data parallel, and a run that goes on in another process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from tests.engine import tiny
from tests.wrapper import parallel_job
from tests.wrapper.small import small_wrapper, train

FOLDER = Path(__file__).parent


def environment() -> dict[str, str]:
    return {name: value for name, value in tiny.process_environment().items() if not name.startswith("PADDLE_")}


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_two_processes_do_what_one_does_with_all_images(version, tmp_path):
    job = FOLDER / "parallel_job.py"
    run("-m", "paddle.distributed.launch", "--nproc_per_node", 2, "--log_dir", tmp_path, job, tmp_path, version)
    ranks = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(2)]
    one = parallel_job.run(version)
    for name, value in one.items():
        if name == "own":
            continue
        if name == "losses":
            np.testing.assert_allclose((ranks[0][name] + ranks[1][name]) / 2, value, atol=1e-5)
            continue
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name], err_msg=name)
        np.testing.assert_allclose(ranks[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.isfinite(ranks[0]["own"])
    assert ranks[0]["own"] != ranks[1]["own"]


@pytest.mark.smoke
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_saved_state_goes_on_in_another_process(version, tmp_path):
    wrapper = small_wrapper(version=version, return_layer=["stem", "body"], len_train_loader=2, epochs=3)
    train(wrapper, 2)
    paddle.save(wrapper.state_dict(), str(tmp_path / "half.pdparams"))
    found = ast.literal_eval(run(FOLDER / "continue_job.py", tmp_path, version).splitlines()[-1])
    # To rounding: Paddle's switches, which other tests leave as they like, choose among kernels.
    assert found == pytest.approx(train(wrapper, 2, start=2), rel=1e-5)


def test_a_state_holds_student_teacher_heads_and_centre():
    names = small_wrapper().state_dict().keys()
    for part in (
        "method.student.backbone.model.fc.weight",
        "method.teacher.backbone.model.stem.1._mean",
        "method.student.head.last_layer.weight_v",
        "method.teacher.head.mlp.0.weight",
        "method.dino_loss.center",
        "next_step",
        "num_forwards",
    ):
        assert part in names
