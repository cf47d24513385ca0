"""The doctor's visits to real runs: what they measure, on one process and on two, and what they say when a collapse is
forced.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from passl.data.demo import make_demo
from passl.doctor.reading import read_run
from passl.doctor.verdict import diagnose
from passl.log import read_metrics
from tests.engine import tiny
from tests.engine.test_distributed import TOOL, launch

# The demo's recipe on a smaller network and smaller pictures.
CONFIG = """
Global:
  {{output_dir: {folder}/out, device: cpu, epochs: 20, max_train_step: 200, use_visualdl: false, save_interval: 20,
    diagnose_every: 20it}}
Model:
  name: DINO
  backbone:
    {{name: VisionTransformer, img_size: 24, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, init_std: 0.1}}
  head: {{name: DINOHead, out_dim: 128, hidden_dim: 64, bottleneck_dim: 32, use_bn: true}}
  freeze_last_layer: 1000
Schedules:
  lr: {{name: Cosine, base: 2e-3, final: 1e-5, warmup: 1ep}}
  weight_decay: {{name: Constant, value: 0.04}}
  teacher_momentum: {{name: Cosine, base: 0.99, final: 1}}
  teacher_temp: {{name: Constant, value: 0.03}}
Optimizer: {{name: AdamW, clip_norm: 3.0}}
DataLoader:
  Train:
    dataset:
      name: ImageFolder
      root: {folder}/train
      transform:
        {{name: MultiCrop, global_crops_size: 24, global_crops_scale: [0.5, 1.0], local_crops_size: 16,
          local_crops_scale: [0.2, 0.5], num_local_crops: 2, global_blur_probs: [0.0, 0.0], local_blur_prob: 0.0,
          global_solarize_probs: [0.0, 0.0]}}
    sampler: {{batch_size: 12}}
    loader: {{num_workers: 0}}
"""
FROZEN = """
from passl.data.loader import Loader
iterate = Loader.iterate
def one_batch(self, *arguments):
    first = None
    for batch in iterate(self, *arguments):
        first = batch if first is None else first
        yield first
Loader.iterate = one_batch
"""
SLOW = """
import time
from passl.data.loader import Loader
iterate = Loader.iterate
def slowly(self, *arguments):
    for batch in iterate(self, *arguments):
        time.sleep(0.3)
        yield batch
Loader.iterate = slowly
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis")
    make_demo(folder, num_train_per_class=24, num_val_per_class=1, size=32)
    for number in range(60):  # one image under many names
        target = folder / f"copies/{number % 3}/{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "train/star/0000.png", target)
    tiny.write_config(folder, CONFIG, "run.yaml")
    tiny.write_config(folder, tiny.PRETRAIN, "tiny.yaml")
    (folder / "frozen.py").write_text(FROZEN)
    (folder / "slow.py").write_text(SLOW)
    return folder


def train(folder: Path, out: Path, config: str = "run.yaml", **values: Any) -> Any:
    return tiny.run(tiny.TRAIN, "-c", folder / config, *tiny.overrides(Global__output_dir=out, **values))


def visits(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "DINO/metrics.jsonl") if row["phase"] == "doctor"]


def said(stderr: str) -> list[str]:
    """The verdicts in a log, in order."""
    return [line.rpartition(": ")[2] for line in stderr.splitlines() if "WARNING: [Doctor] step" in line]


# --- verdicts ---

CASES = {
    "centring off": (
        {"Model__center_momentum": "1.0"},
        "one-hot collapse",
        ["centring is off", "Model.center_momentum (now 1.0): 0.9"],
    ),
    "one image": (
        {"Global__max_train_step": 60, "DataLoader__Train__dataset__root": "{folder}/copies"},
        "not learning",
        ["the data are frozen", "12% of the images compared", "DataLoader.Train.dataset.root (now "],
    ),
    "sharpening off": (
        {"Schedules__teacher_temp__value": "1.0"},
        "uniform collapse",
        ["nothing sharpens: teacher_temp 1 is not below student_temp 0.1", "Schedules.teacher_temp.value (now 1.0)"],
    ),
    "no sharpening, equal temperatures": (
        {"Schedules__teacher_temp__value": "0.1"},
        "uniform collapse",
        ["teacher_temp 0.1 is not below student_temp 0.1"],
    ),
    "lr too high": (
        {"Schedules__lr__base": "1.0"},
        "unstable",
        ["the weights", "Schedules.lr.base (now 1.0): divide by 10"],
    ),
    "SGD, lr too high": (
        {"Schedules__lr__base": "30.0", "Optimizer": "{{name: Momentum, clip_norm: 3.0}}"},
        "unstable",
        ["the weights", "Schedules.lr.base (now 30.0)"],
    ),
    "one batch": (
        {"Global__max_train_step": 80, "Global__plugins": "[{folder}/frozen.py]"},
        "not learning",
        ["the data are frozen", "100% of the batch are pixels of an earlier step"],
    ),
    "lr 0": (
        {"Schedules__lr": "{{name: Constant, value: 0.0}}"},
        "not learning",
        ["the learning rate was at most 0", "Schedules.lr.value (now 0.0): raise it"],
    ),
    "slow data": (
        {"Global__max_train_step": 100, "Global__plugins": "[{folder}/slow.py]"},
        "data-bound",
        ["% of the time passes waiting for data", "DataLoader.Train.loader.num_workers (now 0)"],
    ),
}
DINOV2 = {
    "Global__name": "DINO",
    "Model": """{{name: DINOv2, freeze_last_layer: 1000,
        backbone: {{name: VisionTransformer, img_size: 24, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3,
            init_std: 0.1, mask_token: true}},
        head: {{name: DINOHead, out_dim: 128, hidden_dim: 64, bottleneck_dim: 32, use_bn: true}}}}""",
    "DataLoader__Train__batch_transform": "{{name: BlockMasks, patch_size: 8}}",
}
CASES |= {
    "DINOv2, centring off": (
        {**DINOV2, "Model__center_momentum": "1.0"},
        "one-hot collapse",
        ["centring is off", "Model.center_momentum (now 1.0): 0.9"],
    ),
    "DINOv2 with Sinkhorn-Knopp, sharpening off": (
        {**DINOV2, "Model__centering": "sinkhorn", "Schedules__teacher_temp__value": "1.0"},
        "uniform collapse",
        ["nothing sharpens: teacher_temp 1 is not below student_temp 0.1", "Schedules.teacher_temp.value (now 1.0)"],
    ),
}
QUICK = ("one image",)


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_what_is_forced_is_named(folder, tmp_path, case) -> None:
    """In the log, once; in metrics.jsonl; and from that file alone afterwards."""
    values, verdict, texts = CASES[case]
    done = train(folder, tmp_path, **{key: str(value).format(folder=folder) for key, value in values.items()})
    assert done.returncode == 0, done.stderr
    assert said(done.stderr) == [verdict]
    rows = visits(tmp_path)
    assert rows[-1]["verdict"] == verdict
    (told,) = [row for row in rows if "evidence" in row]
    whole = "\n".join([*told["evidence"], *told["advice"]])
    assert all(text in whole for text in texts), whole
    assert all(text in done.stderr for text in texts)
    assert diagnose(read_run(tmp_path / "DINO")).verdict == verdict


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_is_left_in_peace(folder, tmp_path, seed) -> None:
    done = train(folder, tmp_path, Global__seed=seed, Global__max_train_step=300)
    assert done.returncode == 0, done.stderr
    assert "[Doctor]" not in done.stderr
    assert {row["verdict"] for row in visits(tmp_path)} == {"healthy"}
    assert diagnose(read_run(tmp_path / "DINO")).verdict == "healthy"


def test_a_loss_that_is_not_finite_is_unstable_afterwards(folder, tmp_path) -> None:
    done = train(folder, tmp_path, Schedules__lr__base="1e30", Optimizer="{name: Momentum}", Global__max_train_step=40)
    assert done.returncode == 1
    assert "not finite" in done.stderr
    found = diagnose(read_run(tmp_path / "DINO"))
    assert found.verdict == "unstable"
    assert "not finite at step" in found.evidence[0]
    assert found.advice[0].startswith("Schedules.lr.base (now 1e+30): divide by 10")


# --- measuring ---


@pytest.mark.smoke
def test_visits_and_their_rows(folder, tmp_path) -> None:
    """Each `diagnose_every` steps and at the end; the first step, for comparison, only where there is another one."""
    short = train(folder, tmp_path / "short", "tiny.yaml", Global__max_train_step=10)
    assert short.returncode == 0, short.stderr
    assert visits(tmp_path / "short") == []
    done = train(
        folder,
        tmp_path / "seen",
        "tiny.yaml",
        Global__diagnose_every="4it",
        Global__accum_steps=2,
        Global__max_train_step=10,
    )
    assert done.returncode == 0, done.stderr
    rows = visits(tmp_path / "seen")
    assert [row["step"] for row in rows] == [1, 4, 8, 10]
    train_rows = {
        row["step"]: row for row in read_metrics(tmp_path / "seen/DINO/metrics.jsonl") if row["phase"] == "train"
    }
    for row in rows:
        json.dumps(row, allow_nan=False)
        assert row["out_dim"] == 20
        assert 0 <= row["teacher_entropy"] <= row["teacher_mean_entropy"] + 1e-5 <= 3.0
        assert 1 <= row["prototypes_in_use"] <= 4
        assert 0 <= row["feature_std"] <= 1 <= row["effective_rank"] <= 4
        assert row["lr"] == train_rows[row["step"]]["lr"]
        assert row["gradient_norm"] >= row["gradient_norm_backbone"] > 0
    assert rows[0]["loss"] == pytest.approx(train_rows[1]["loss"], abs=1e-6)
    means = [train_rows[step]["loss"] for step in (2, 3, 4)]
    assert rows[1]["loss"] == pytest.approx(sum(means) / 3, abs=1e-5)


def test_watching_changes_nothing(folder, tmp_path) -> None:
    for out, interval in (("seen", "1it"), ("unseen", "null")):
        options = {"Global__diagnose_every": interval, "Global__max_train_step": 6}
        done = train(folder, tmp_path / out, "tiny.yaml", **options)
        assert done.returncode == 0, done.stderr
    tiny.assert_same_checkpoint(tmp_path / "seen/DINO/latest", tmp_path / "unseen/DINO/latest")
    assert len(visits(tmp_path / "seen")) == 6
    assert visits(tmp_path / "unseen") == []


def test_a_resumed_run_keeps_its_visits(folder, tmp_path) -> None:
    values = {"Global__diagnose_every": "2it"}
    assert train(folder, tmp_path, "tiny.yaml", Global__max_train_step=4, **values).returncode == 0
    again = train(folder, tmp_path, "tiny.yaml", Global__max_train_step=8, Global__checkpoint="auto", **values)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in visits(tmp_path)] == [1, 2, 4, 6, 8]


def test_two_processes_measure_what_one_does(folder, tmp_path) -> None:
    shared = {"Model__backbone__drop_path_rate": 0, "Global__max_train_step": 4, "Global__diagnose_every": "2it"}
    one = train(folder, tmp_path / "one", "tiny.yaml", DataLoader__Train__sampler__batch_size=8, **shared)
    assert one.returncode == 0, one.stderr
    options = tiny.overrides(Global__output_dir=tmp_path / "two", **shared)
    two = launch(tmp_path, TOOL, "-c", folder / "tiny.yaml", *options)
    assert two.returncode == 0, two.stdout + two.stderr
    for ours, theirs in zip(visits(tmp_path / "one"), visits(tmp_path / "two")):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"data_wait", "phase", "verdict"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-5), key


def test_an_interval_that_is_none_is_refused(folder, tmp_path) -> None:
    done = train(folder, tmp_path, "tiny.yaml", Global__diagnose_every="0it")
    assert done.returncode == 2
    assert "Global.diagnose_every (0it): shorter than one step" in done.stderr
