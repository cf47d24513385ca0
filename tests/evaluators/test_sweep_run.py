"""From the sweep to the classes of a picture by commands, on one process and on two."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.engine import tiny
from tests.engine.test_distributed import launch
from tests.engine.test_fine_tune_run import EXPORT, PREDICT

SWEEP = """
Global: {{output_dir: {folder}/out, device: cpu, name: sweep}}
Model:
  name: LinearProbe
  backbone: {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 12, depth: 2, num_heads: 2}}
  num_classes: 3
  n_last_blocks: 1
Evaluators:
  - name: LinearSweep
    n_last_blocks: [1, 2]
    learning_rates: [0.1, 1.0]
    epochs: 8
    train_batch_size: 8
    cache: true
    batch_size: 4
    train_dataset: &train
      name: ImageFolder
      root: {folder}/train
      transform: &validation [Resize: {{size: 16}}, ToTensor: {{}}, Normalize: {{}}]
    val_dataset: &val {{name: ImageFolder, root: {folder}/val, transform: *validation}}
  - name: LogisticRegression
    n_last_blocks: 2
    cache: true
    batch_size: 4
    train_dataset: *train
    val_dataset: *val
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_images(folder)
    tiny.write_config(folder, SWEEP, "sweep.yaml")
    return folder


@pytest.fixture(scope="module")
def swept(folder):
    done = tiny.run(tiny.EVAL, "-c", folder / "sweep.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "out/sweep"


def test_the_best_is_exported_and_predicts(folder, swept):
    best = json.loads((swept / "linear.json").read_text())["best"]
    options = tiny.overrides(
        Global__pretrained_model=swept / "linear_best",
        Model__n_last_blocks=best["n_last_blocks"],
        Model__avgpool=str(best["avgpool"]).lower(),
    )
    exported = tiny.run(EXPORT, "-c", folder / "sweep.yaml", *options, "--out", folder / "best.passl")
    assert exported.returncode == 0, exported.stderr
    predicted = tiny.run(PREDICT, folder / "best.passl", folder / "val", "--output", folder / "lines.jsonl")
    assert predicted.returncode == 0, predicted.stderr
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    hits = [line["classes"][0]["class"] in line["path"] for line in lines]
    assert 100 * np.mean(hits) == pytest.approx(best["top1"])


@pytest.mark.slow
def test_two_processes_find_the_same(folder, swept):
    """The features are shared out, then the choices; what one process drew or summed decides for all."""
    own = json.loads((swept / "eval.json").read_text())
    options = tiny.overrides(Global__output_dir=folder / "two")
    done = launch(folder, tiny.ROOT / "tools/eval.py", "-c", folder / "sweep.yaml", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    other = json.loads((folder / "two/sweep/eval.json").read_text())
    assert list(other) == list(own)
    for name, value in own.items():
        assert other[name] == pytest.approx(value, abs=1e-4), name
    again = launch(folder, tiny.ROOT / "tools/eval.py", "-c", folder / "sweep.yaml", *options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((folder / "two/sweep/eval.json").read_text()) == other
    assert "features from" in (folder / "two/sweep/eval.log").read_text()
