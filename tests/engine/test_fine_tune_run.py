"""Fine-tuning from the weights of a run to classes of a picture, as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from passl import checkpoint
from tests.engine import tiny
from tests.engine.test_distributed import TOOL, launch

EXPORT = "from passl.cli import export_main; export_main()"
PREDICT = "from passl.cli import predict_main; predict_main()"
FINE_TUNE = """
Global:
  {{output_dir: {folder}/out, device: cpu, epochs: 3, save_interval: 2it, print_batch_step: 1, use_visualdl: false}}
Model:
  name: FineTune
  backbone:
    {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 12, depth: 2, num_heads: 2, drop_path_rate: 0.2}}
  num_classes: 3
  pool: mean
  layer_decay: 0.6
  label_smoothing: 0.1
  mixup_alpha: 0.8
  cutmix_alpha: 1.0
Schedules:
  lr: {{name: Cosine, base: 0.05, reference_batch_size: 256, per_epoch: true}}
Optimizer: {{name: AdamW, clip_norm: 3.0}}
DataLoader:
  Train:
    dataset:
      name: ImageFolder
      root: {folder}/train
      transform: [RandomResizedCrop: {{size: 16}}, ToTensor: {{}}, Normalize: {{}}, RandomErasing: {{}}]
    sampler: {{batch_size: 5, drop_last: false}}
    loader: {{num_workers: 0}}
  Eval:
    dataset:
      name: ImageFolder
      root: {folder}/val
      transform: [Resize: {{size: 18}}, CenterCrop: {{size: 16}}, ToTensor: {{}}, Normalize: {{}}]
    sampler: {{batch_size: 4}}
    loader: {{num_workers: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine_tune")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, FINE_TUNE, "tune.yaml")
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(Global__max_train_step=4))
    assert done.returncode == 0, done.stderr
    return folder


def tune(folder, out, *more, killed_at=None):
    code = tiny.TRAIN if killed_at is None else tiny.KILLED_AT.format(step=killed_at) + tiny.TRAIN
    values = {"Global__output_dir": folder / out, "Global__pretrained_model": folder / "out/DINO/latest"}
    return tiny.run(code, "-c", folder / "tune.yaml", *tiny.overrides(**values), *more)


@pytest.fixture(scope="module")
def tuned(folder):
    done = tune(folder, "whole")
    assert done.returncode == 0, done.stderr
    assert "the teacher's backbone of it, for FineTune; its heads begin anew" in done.stderr
    return folder / "whole/FineTune"


@pytest.mark.smoke
def test_killed_in_an_epoch_and_resumed_is_bit_identical(folder, tuned):
    """Mixing, erasing, drop path and the rates by layer are those of the step, whoever takes it."""
    assert tune(folder, "killed", killed_at=5).returncode == -9
    resumed = tune(folder, "killed", "-o", "Global.checkpoint=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 4" in resumed.stderr
    tiny.assert_same_checkpoint(tuned / "latest", folder / "killed/FineTune/latest")


def test_every_weight_moved_from_the_teachers(folder, tuned):
    teacher = checkpoint.backbone_state(checkpoint.read_weights(folder / "out/DINO/latest"))
    after = checkpoint.read_weights(tuned / "latest")
    same = [name for name, value in teacher.items() if (after[f"backbone.{name}"] == value).all()]
    assert not same


def test_evaluation_export_and_prediction(folder, tuned):
    options = tiny.overrides(Global__pretrained_model=tuned / "best", Global__output_dir=folder / "eval")
    scored = tiny.run(tiny.EVAL, "-c", folder / "tune.yaml", *options)
    assert scored.returncode == 0, scored.stderr
    result = json.loads((folder / "eval/FineTune/eval.json").read_text())
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert set(result) == {"top1", "top5", "loss"}
    written = {path.name for path in (folder / "eval/FineTune").iterdir()}
    assert {"confusion.png", "confusion.csv", "per_class.csv"} <= written
    assert result["top1"] == max(row["top1"] for row in rows)
    out = folder / "tuned.passl"
    exported = tiny.run(EXPORT, "-c", folder / "tune.yaml", *options, "--out", out)
    assert exported.returncode == 0, exported.stderr
    assert "3 classes (linear), images 16 x 16" in exported.stdout
    lines = folder / "lines.jsonl"
    predicted = tiny.run(PREDICT, out, folder / "val", "--output", lines, "--features", folder / "f.npy")
    assert predicted.returncode == 0, predicted.stderr
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {one["class"] for one in found[0]["classes"]} == {"class0", "class1", "class2"}
    hits = [one["classes"][0]["class"] in one["path"] for one in found]
    assert 100 * np.mean(hits) == pytest.approx(result["top1"])
    assert np.load(folder / "f.npy").shape == (9, 12)


def test_a_backbone_alone_is_not_exported_as_a_classifier(folder):
    weights = tiny.overrides(Global__pretrained_model=folder / "out/DINO/latest")
    done = tiny.run(EXPORT, "-c", folder / "tune.yaml", *weights, "--out", folder / "no.passl")
    assert done.returncode == 1
    assert "has no weights for all of FineTune, only a backbone: its classes would be random" in done.stderr


def test_two_processes_and_micro_batches_are_one_with_twice_the_batch(folder, tuned):
    """Without what each process draws for itself."""
    plain = tiny.overrides(
        Model__mixup_alpha=0, Model__cutmix_alpha=0, Model__backbone__drop_path_rate=0,
        Global__pretrained_model=folder / "out/DINO/latest",
    )  # fmt: skip
    more = ["-o", "DataLoader.Train.sampler.drop_last=true"]
    size = "DataLoader.Train.sampler.batch_size"
    one = tiny.run(
        tiny.TRAIN,
        "-c",
        folder / "tune.yaml",
        *plain,
        *more,
        "-o",
        f"Global.output_dir={folder}/one",
        "-o",
        f"{size}=4",
    )
    assert one.returncode == 0, one.stderr
    accumulated = ["-o", f"Global.output_dir={folder}/two", "-o", "Global.accum_steps=2", "-o", f"{size}=2"]
    accumulated += ["-o", "DistributedStrategy.sharding=true"]
    two = launch(folder, TOOL, "-c", folder / "tune.yaml", *plain, *more, *accumulated)
    assert two.returncode == 0, two.stdout + two.stderr
    tiny.assert_close_runs(folder / "one/FineTune", folder / "two/FineTune", 1e-4)
