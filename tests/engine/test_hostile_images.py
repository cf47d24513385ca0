"""Whatever lies in a folder of images, pre-training and k-NN use the good ones and name the others."""

from __future__ import annotations

import json
import math

import pytest

from passl.log import read_metrics
from tests.data import hostile_images
from tests.engine import tiny

CONFIG = tiny.PRETRAIN.replace("epochs: 3", "epochs: 1").replace("save_interval: 2it, ", "")
EVALUATION = """
Evaluators:
  - name: KNN
    k: [3, 20]
    num_workers: 2
    train_dataset: &everything
      name: ImageFolder
      root: {folder}/train
      max_bad_samples: 100000
      transform:
        [Resize: {{size: 18, interpolation: bicubic}}, CenterCrop: {{size: 16}}, ToTensor: {{}}, Normalize: {{}}]
    val_dataset: *everything
"""


@pytest.mark.parametrize("backend", ["opencv", "pillow"])
@pytest.mark.parametrize("count", [206, pytest.param(2000, marks=pytest.mark.slow)])
def test_good_images_are_used_and_bad_ones_named(tmp_path, count, backend):
    files = hostile_images.write(tmp_path / "train", count)
    special = hostile_images.write_special(tmp_path / "train")
    tiny.write_config(tmp_path, CONFIG + EVALUATION, "run.yaml")
    run = tiny.run(
        tiny.TRAIN, "-c", tmp_path / "run.yaml",
        "-o", "DataLoader.Train.dataset.max_bad_samples=100000",
        "-o", "DataLoader.Train.loader.num_workers=2",
        "-o", "DataLoader.Train.sampler={batch_size: 16, drop_last: false}",
        "-o", f"DataLoader.Train.dataset.transform.backend={backend}",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]

    results = [line for line in read_metrics(tmp_path / "out/DINO/metrics.jsonl") if line["phase"] == "eval"]
    assert math.isfinite(results[-1]["knn_top1_k3"])
    log = (tmp_path / "out/DINO/train.log").read_text()
    training, evaluation = log.split("[Train][Epoch 1/1][Avg]")
    bad = [path for path, what in files.items() if what == hostile_images.BAD] + special
    good = [path for path, what in files.items() if what == hostile_images.GOOD]
    for part in (training, evaluation):
        assert [path for path in bad if path not in part] == []
        assert [path for path in good if path in part] == []
    assert json.dumps(results[-1])
