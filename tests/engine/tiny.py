"""A tiny DINO run for the tests of the engine: images, configurations, and ways to run them in a process of their
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from passl import checkpoint
from passl.log import read_metrics

ROOT = Path(__file__).parents[2]
TRAIN = "from passl.cli import train_main; train_main()"
EVAL = "from passl.cli import eval_main; eval_main()"
KILLED_AT = """
import os, signal
from passl.engine.hooks import LogHook
after_step = LogHook.after_step
def kill(self, trainer):
    after_step(self, trainer)
    if trainer.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
LogHook.after_step = kill
"""

PRETRAIN = """
Global:
  {{output_dir: {folder}/out, device: cpu, epochs: 3, seed: 3, save_interval: 2it, print_batch_step: 1,
    use_visualdl: false}}
Model:
  name: DINO
  backbone:
    {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 12, depth: 2, num_heads: 2, drop_path_rate: 0.2}}
  head: {{name: DINOHead, out_dim: 20, hidden_dim: 12, bottleneck_dim: 8, norm_last_layer: false}}
Schedules:
  lr: {{name: Cosine, base: 0.05, final: 1e-5, warmup: 1ep, reference_batch_size: 256}}
  weight_decay: {{name: Cosine, base: 0.04, final: 0.4}}
  teacher_momentum: {{name: Cosine, base: 0.9, final: 1}}
  teacher_temp: {{name: Constant, value: 0.04}}
Optimizer: {{name: AdamW, clip_norm: 3.0}}
DataLoader:
  Train:
    dataset:
      name: ImageFolder
      root: {folder}/train
      transform: {{name: MultiCrop, global_crops_size: 16, local_crops_size: 8, num_local_crops: 2}}
    sampler: {{batch_size: 4}}
    loader: {{num_workers: 0}}
"""
PROBE = """
Global: {{output_dir: {folder}/out, device: cpu, epochs: 2, print_batch_step: 1, use_visualdl: false}}
Model:
  name: LinearProbe
  backbone: {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 12, depth: 2, num_heads: 2}}
  num_classes: 3
  n_last_blocks: 2
Schedules:
  lr: {{name: Cosine, base: 0.1, reference_batch_size: 256, per_epoch: true}}
Optimizer: {{name: Momentum}}
DataLoader:
  Train:
    dataset:
      name: ImageFolder
      root: {folder}/train
      transform: [RandomResizedCrop: {{size: 16}}, RandomHorizontalFlip: {{}}, ToTensor: {{}}, Normalize: {{}}]
    sampler: {{batch_size: 5, drop_last: false}}
    loader: {{num_workers: 0}}
  Eval:
    dataset:
      name: ImageFolder
      root: {folder}/val
      transform: &eval
        [Resize: {{size: 18, interpolation: bicubic}}, CenterCrop: {{size: 16}}, ToTensor: {{}}, Normalize: {{}}]
    sampler: {{batch_size: 4}}
    loader: {{num_workers: 0}}
Evaluators:
  - name: KNN
    k: [3, 20]
    train_dataset: {{name: ImageFolder, root: {folder}/train, transform: *eval}}
    val_dataset: {{name: ImageFolder, root: {folder}/val, transform: *eval}}
"""


def write_images(folder: Path, classes: int = 3, train: int = 5, val: int = 3, size: int = 24) -> None:
    """Class folders of noise images, each class in a colour of its own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (size, size, 3))
                pixels[..., label % 3] //= 3
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number}.png")


def write_config(folder: Path, text: str, name: str) -> Path:
    path = folder / name
    path.write_text(text.format(folder=folder))
    return path


def run(
    code: str, *arguments: str, cwd: Optional[Path] = None, seconds: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """`python -c code arguments` in a process of its own, for so long at most."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=process_environment(**environment), capture_output=True, text=True, timeout=seconds
    )


def process_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def overrides(**values: str) -> list[str]:
    """`Global__seed=1` as `-o Global.seed=1`."""
    return [word for key, value in values.items() for word in ("-o", f"{key.replace('__', '.')}={value}")]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Every array of the three files equal to the last bit, and so the files."""
    for suffix in (checkpoint.PARAMS, checkpoint.OPTIMIZER):
        files = [checkpoint.with_suffix(prefix, suffix).read_bytes() for prefix in (one, other)]
        assert files[0] == files[1], suffix
        a, b = (checkpoint.read(checkpoint.with_suffix(prefix, suffix)) for prefix in (one, other))
        assert sorted(a) == sorted(b)
        for name in a:
            assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), (suffix, name)
    a, b = checkpoint.read_states(one), checkpoint.read_states(other)
    for key in ("step", "epoch", "progress", "scaler"):
        assert a[key] == b[key], key


def assert_close_runs(one: Path, other: Path, tolerance: float = 2e-5) -> None:
    """Losses of all steps and final weights of two runs, to float32 rounding.

    Left out: the key third of `attn.qkv.bias`, whose true gradient is 0, so that Adam amplifies rounding noise in it.
    """
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=0, atol=tolerance)
    a, b = (checkpoint.read_weights(run / "latest") for run in (one, other))
    assert sorted(a) == sorted(b)
    for name in a:
        values = [a[name], b[name]]
        if name.endswith("attn.qkv.bias"):
            third = len(a[name]) // 3
            values = [np.delete(value, np.s_[third : 2 * third]) for value in values]
        np.testing.assert_allclose(*values, rtol=0, atol=tolerance, err_msg=name)
