"""docs/your_algorithm.md: its code is that of the folder, and its commands work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.engine import tiny

PAGE = tiny.ROOT / "docs/your_algorithm.md"
COMMANDS = {"passl-data": "data_main", "passl-train": "train_main", "passl-eval": "eval_main"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_is_that_of_the_folder():
    folder = tiny.ROOT / "passl/models/simsiam"
    assert blocks("python") == [(folder / "method.py").read_text(encoding="utf-8")]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py"))
    assert lines < 150
    line = "from passl.models.simsiam import SimSiam"
    assert line in (tiny.ROOT / "passl/models/__init__.py").read_text(encoding="utf-8").splitlines()


def run(block: str, folder, shorter: list[str]) -> str:
    """The block as one shell script, in which passl's commands are this environment's, `passl-train` shorter."""
    functions = [f'python() {{ {shlex.quote(sys.executable)} "$@"; }}']
    for name, function in COMMANDS.items():
        code = f"from passl.cli import {function}; {function}()"
        more = shlex.join(shorter) if name == "passl-train" else ""
        functions.append(f'{name}() {{ python -c "{code}" "$@" {more}; }}')
    script = "\n".join(["set -e", *functions, block])
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=tiny.process_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stderr


def test_a_copy_of_the_file_is_a_plugin(tmp_path):
    shutil.copytree(tiny.ROOT / "configs", tmp_path / "configs")
    tiny.write_images(tmp_path / "demo_data", size=48)
    steps = tiny.overrides(Global__epochs="1", Global__report="false", Schedules__lr__warmup="1it", Evaluators="[]")
    steps += tiny.overrides(DataLoader__Train__sampler__batch_size="5", DataLoader__Train__loader__num_workers="0")
    log = run(blocks("bash")[1], tmp_path, steps)
    assert "MySiam: 0.37 M trainable parameters" in log
    assert (tmp_path / "output/demo/MySiam/latest.pdparams").exists()


@pytest.mark.slow
def test_k_nn_beats_an_untrained_network(tmp_path):
    """One epoch of four: k-NN is above that of an untrained network (20 %) and of raw pixels (23 %) by far."""
    shutil.copytree(tiny.ROOT / "configs", tmp_path / "configs")
    run(blocks("bash")[0], tmp_path, tiny.overrides(Global__epochs="1", Global__report="false"))
    results = json.loads((tmp_path / "output/demo/knn/VisionTransformer/eval.json").read_text())
    assert results["knn_top1_k20"] > 35
