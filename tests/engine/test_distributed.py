"""Several processes on one machine (gloo), started as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import tiny

TOOL = tiny.ROOT / "tools" / "train.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    tiny.write_images(folder, train=8)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    return folder


def launch(folder, program, *arguments, processes=2):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)]
    command += ["--log_dir", str(folder / "launch"), str(program), *map(str, arguments)]
    environment = {name: value for name, value in tiny.process_environment().items() if not name.startswith("PADDLE_")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def options(**values):
    return tiny.overrides(Model__backbone__drop_path_rate=0, Global__epochs=5, Global__max_train_step=10, **values)


@pytest.mark.smoke
def test_two_processes_are_one_with_twice_the_batch(folder):
    one = tiny.run(
        tiny.TRAIN,
        "-c",
        folder / "pretrain.yaml",
        *options(Global__output_dir=folder / "one", DataLoader__Train__sampler__batch_size=8),
    )
    assert one.returncode == 0, one.stderr
    two = launch(folder, TOOL, "-c", folder / "pretrain.yaml", *options(Global__output_dir=folder / "two"))
    assert two.returncode == 0, two.stdout + two.stderr
    tiny.assert_close_runs(folder / "one/DINO", folder / "two/DINO")
    assert len((folder / "two/DINO/train.log").read_text().splitlines()) == len(
        (folder / "one/DINO/train.log").read_text().splitlines()
    )


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
