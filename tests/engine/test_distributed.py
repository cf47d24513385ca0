"""Several processes on one machine (gloo), started as users start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from passl import checkpoint
from tests.engine import batch_norm_job, tiny

TOOL = tiny.ROOT / "tools" / "train.py"
RESNET = tiny.ROOT / "configs/dino/dino_resnet50_224_pt_in1k_1n8c_dp_fp16o1.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    tiny.write_images(folder, train=8)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    return folder


def launch_command(folder, program, *arguments, processes, launcher=()):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), *launcher]
    command += ["--log_dir", str(folder / "launch"), str(program), *map(str, arguments)]
    environment = {name: value for name, value in tiny.process_environment().items() if not name.startswith("PADDLE_")}
    return command, environment


def launch(folder, program, *arguments, processes=2):
    command, environment = launch_command(folder, program, *arguments, processes=processes)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def start(folder, program, *arguments, processes=2, launcher=()):
    """The launched job, while it runs."""
    command, environment = launch_command(folder, program, *arguments, processes=processes, launcher=launcher)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipe)


def options(**values):
    return tiny.overrides(Model__backbone__drop_path_rate=0, Global__epochs=5, Global__max_train_step=10, **values)


@pytest.fixture(scope="module")
def one(folder):
    """A run of one process."""
    values = {"Global__output_dir": folder / "one", "DataLoader__Train__sampler__batch_size": 8}
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options(**values))
    assert done.returncode == 0, done.stderr
    return folder / "one/DINO"


@pytest.mark.smoke
def test_two_processes_are_one_with_twice_the_batch(folder, one):
    two = launch(folder, TOOL, "-c", folder / "pretrain.yaml", *options(Global__output_dir=folder / "two"))
    assert two.returncode == 0, two.stdout + two.stderr
    tiny.assert_close_runs(one, folder / "two/DINO")
    assert len((folder / "two/DINO/train.log").read_text().splitlines()) == len(
        (one / "train.log").read_text().splitlines()
    )


@pytest.mark.slow
def test_two_nodes_are_one_process_with_twice_the_batch(folder, one):
    """Two launchers, each with its process and two micro-batches; shares of the optimizer's state."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ["-c", folder / "pretrain.yaml", *options(Global__output_dir=folder / "nodes", Global__accum_steps=2)]
    arguments += ["-o", "DistributedStrategy.sharding=true"]
    nodes = []
    for rank in range(2):
        (folder / f"node{rank}").mkdir()
        place = ["--nnodes", "2", "--rank", str(rank), "--master", master]
        nodes.append(start(folder / f"node{rank}", TOOL, *arguments, processes=1, launcher=place))
    for node in nodes:
        shown, _ = node.communicate(timeout=300)
        assert node.returncode == 0, shown
    tiny.assert_close_runs(one, folder / "nodes/DINO")


@pytest.mark.smoke
def test_batch_norms_see_the_batches_of_all_processes(folder, float64):
    """As one process that has them all: output, gradients, running statistics."""
    done = launch(folder, batch_norm_job.__file__, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    shares = [np.load(folder / f"{rank}.npz") for rank in range(2)]
    for layer_type in batch_norm_job.SHAPES:
        name = layer_type.__name__
        expected = batch_norm_job.results(layer_type, [row for rows in batch_norm_job.SHARES for row in rows])
        for key, value in expected.items():
            first, second = (share[f"{name}/{key}"] for share in shares)
            if key in ("y", "x"):
                found = np.concatenate([first, second])
            elif key in ("weight", "bias"):
                found = first + second
            else:
                assert (first == second).all(), f"{name} {key}"
                found = first
            np.testing.assert_allclose(found, value, rtol=0, atol=1e-12, err_msg=f"{name} {key}")


@pytest.mark.slow
def test_the_resnet_recipe_on_two_processes_is_one_with_twice_the_batch(folder):
    """At a tiny size, with batch norms in the head too, and with micro-batches."""
    values = {
        "Global.device": "cpu",
        "Global.use_visualdl": "false",
        "Global.accum_steps": 2,
        "Global.print_batch_step": 1,
        "Global.max_train_step": 6,
        "FP16.level": "O0",
        "Model.backbone": "{name: ResNet, depths: [1, 1, 1, 1], width: 8, bottleneck: false}",
        "Model.head": "{name: DINOHead, out_dim: 20, hidden_dim: 12, bottleneck_dim: 8, use_bn: true}",
        "Schedules.lr.base": 1.0,
        "DataLoader.Train.dataset.root": folder / "train",
        "DataLoader.Train.dataset.transform.global_crops_size": 64,
        "DataLoader.Train.dataset.transform.local_crops_size": 32,
        "DataLoader.Train.dataset.transform.num_local_crops": 2,
        "DataLoader.Train.loader.num_workers": 0,
        "Evaluators": "null",
    }
    runs = []
    for processes in (1, 2):
        values["Global.output_dir"] = folder / f"resnet{processes}"
        values["DataLoader.Train.sampler.batch_size"] = 8 // processes
        arguments = [word for key, value in values.items() for word in ("-o", f"{key}={value}")]
        done = launch(folder, TOOL, "-c", RESNET, *arguments, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(values["Global.output_dir"] / "DINO")
    tiny.assert_close_runs(*runs)
    weights = checkpoint.read_weights(runs[0] / "latest")
    moved = {name: np.abs(value).max() for name, value in weights.items() if name.endswith("_mean")}
    assert min(moved.values()) > 1e-3, moved


def test_probe_and_evaluation_on_two_processes(folder):
    results = []
    for processes in (1, 2):
        out = folder / f"probe{processes}"
        values = {"Global__output_dir": out, "DataLoader__Train__sampler__batch_size": 8 // processes}
        done = launch(folder, TOOL, "-c", folder / "probe.yaml", *tiny.overrides(**values), processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [row for row in tiny.read_metrics(out / "LinearProbe/metrics.jsonl") if row["phase"] == "eval"]
        results.append([{k: v for k, v in row.items() if k != "step"} for row in rows])
    assert len(results[0]) == 2
    for one, two in zip(*results):
        assert one == pytest.approx(two, abs=1e-4)


def test_a_failing_process_ends_the_job_with_its_error(folder):
    script = folder / "failing.py"
    script.write_text(
        "import os\n"
        "from passl.models import DINO\n"
        "forward = DINO.forward\n"
        "def fail(self, batch, teacher_temp):\n"
        "    if os.environ['PADDLE_TRAINER_ID'] == '1':\n"
        "        raise RuntimeError('the second process gave up')\n"
        "    return forward(self, batch, teacher_temp)\n"
        "DINO.forward = fail\n"
        "from passl.cli import train_main\n"
        "train_main()\n"
    )
    done = launch(folder, script, "-c", folder / "pretrain.yaml", *options(Global__output_dir=folder / "failing"))
    assert done.returncode != 0
    assert "the second process gave up" in done.stdout + done.stderr  # and not the broken connection of the first


def test_unreadable_files_of_all_processes_are_named_and_counted(folder):
    """Every other file, all of them the second process's."""
    good = sorted((folder / "train").rglob("*.png"))
    lines = [line for number in range(6) for line in (str(good[number]), f"{folder}/missing{number}.png")]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    data = "{name: ImageList, list_file: %s, max_bad_samples: %d, transform: {name: MultiCrop, global_crops_size: 16, "
    data += "local_crops_size: 8, num_local_crops: 2}}"
    results = {}
    for limit in (6, 5):
        values = {"Global__output_dir": folder / f"bad{limit}", "DataLoader__Train__sampler__batch_size": 2}
        values["DataLoader__Train__dataset"] = data % (folder / "list.txt", limit)
        values["DataLoader__Train__sampler__shuffle"] = "false"
        arguments = ["-c", folder / "pretrain.yaml", *tiny.overrides(Global__epochs=1), *options(**values)]
        results[limit] = launch(folder, TOOL, *arguments, "-o", "Global.epochs=1", "-o", "Global.max_train_step=3")
    log = (folder / "bad6/DINO/train.log").read_text()
    assert results[6].returncode == 0, results[6].stdout + results[6].stderr
    assert [f"missing{number}.png" in log for number in range(6)] == [True] * 6
    assert results[5].returncode != 0
    shown = results[5].stdout + results[5].stderr
    assert "more than max_bad_samples (5) image files cannot be read" in shown
    assert [f"missing{number}.png" in shown for number in range(6)] == [True] * 6


def test_console_script_under_the_launcher(folder):
    script = Path(sys.executable).with_name("passl-train")
    if not script.is_file():
        pytest.skip("passl is not installed beside this Python")
    assert os.access(script, os.X_OK)
    done = launch(folder, script, "-c", folder / "pretrain.yaml", *options(Global__output_dir=folder / "script"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "script/DINO/latest.pdparams").is_file()
