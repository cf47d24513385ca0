"""Losses and gradients that are not finite: the report, and the three policies."""

from __future__ import annotations

import functools

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.config import load
from passl.engine import precision as precision_module
from passl.engine import run
from passl.engine.precision import Precision, in_full_precision
from passl.engine.trainer import Trainer
from passl.log import read_metrics
from passl.models.dino import DINO, DINOHead, DINOLoss
from passl.models.multi_crop import MultiCropNetwork
from passl.models.probe import LinearProbe
from passl.models.vision_transformer import VisionTransformer
from tests.engine import tiny
from tests.engine.test_distributed import launch

# Three steps an epoch, nine in all; checkpoints every two steps.
LAST_STEP = 9


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    return tmp_path


def train(folder, *more):
    return tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *more)


# One sample of each epoch reaches the model as NaN.
SPOIL = """
from passl.engine.trainer import Trainer
train_step = Trainer.train_step
def spoil(self, batch):
    views = batch["global_crops"]
    views.reshape(2, 4, -1)[:, batch["index"] == 7] = float("nan")
    train_step(self, batch)
Trainer.train_step = spoil
"""


@pytest.mark.smoke
def test_the_report_names_sample_layer_and_last_checkpoint(folder):
    done = tiny.run(SPOIL + tiny.TRAIN, "-c", folder / "pretrain.yaml")
    assert done.returncode == 1, done.stderr
    error = done.stderr[done.stderr.index("error: loss or gradients are not finite at step") :]
    assert "loss nan" in error
    assert f"the input itself (global_crops) is not finite, 1 sample(s): {folder / 'train/class1/2.png'};" in error
    assert "float32 (FP16.level O0), loss scale 1" in error
    assert "teacher_temp 0.04" in error
    assert "last good checkpoint: " in error
    assert "Traceback" not in done.stderr
    step = int(error.split("at step ")[1].split()[0])
    if step >= 2:
        assert f"last good checkpoint: {folder / 'out/DINO/latest'}" in error
        assert checkpoint.read_states(folder / "out/DINO/latest")["step"] <= step
    else:
        assert "last good checkpoint: none. Start with a lower Schedules.lr.base" in error


# What a layer does from one step on.
POISON = """
import paddle
from passl.models.vision_transformer import {layer} as Layer
from passl.engine.trainer import Trainer
train_step, forward, now = Trainer.train_step, Layer.forward, []
def count(self, batch):
    now[:] = [self.step]
    train_step(self, batch)
def spoil(self, x, *more):
    y = forward(self, x, *more)
    return {change} if now and now[0] {when} else y
Trainer.train_step, Layer.forward = count, spoil
"""


def poisoned(folder, change, when, *more, layer="Block"):
    code = POISON.format(layer=layer, change=change, when=when)
    return tiny.run(code + tiny.TRAIN, "-c", folder / "pretrain.yaml", *more)


def test_the_first_layer_is_named(folder):
    done = poisoned(folder, "y / (y - y)", "== 5")
    assert done.returncode == 1
    assert "at step 5 (epoch 2)" in done.stderr
    first = "the first layer whose output is not finite is teacher.backbone.blocks.0 (Block, float32 [8, 5, 12])"
    assert f"{first}, 4 sample(s): " in done.stderr
    assert done.stderr.count(".png") == 4
    assert f"last good checkpoint: {folder / 'out/DINO/latest'}" in done.stderr
    assert checkpoint.read_states(folder / "out/DINO/latest")["step"] == 4


def test_an_infinite_gradient_of_a_finite_loss_is_found(folder):
    # The square root of zero: its value is finite, its slope is not.
    done = poisoned(folder, "y + 0 * paddle.sqrt(y - y.detach())", "== 3")
    assert done.returncode == 1
    assert "at step 3" in done.stderr
    assert "every output and the loss are finite, and the gradients of" in done.stderr
    assert "student.backbone.blocks" in done.stderr
    weights = checkpoint.read_weights(folder / "out/DINO/latest")
    assert all(np.isfinite(value).all() for value in weights.values())


def test_skipping_leaves_the_step_out(folder):
    """The weights are those of a run whose optimizer, centre and averages never met the step."""
    skip = ["-o", "Global.non_finite={policy: skip, max_skipped: 2}"]
    done = poisoned(folder, "y * float('nan')", "in (4, 6)", *skip)
    assert done.returncode == 0, done.stderr
    assert "this step is left out (2 of at most 2)" in done.stderr
    states = checkpoint.read_states(folder / "out/DINO/latest")
    assert states["step"] == LAST_STEP
    assert states["progress"]["skipped_steps"] == 2
    rows = [row for row in read_metrics(folder / "out/DINO/metrics.jsonl") if row["phase"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, LAST_STEP + 1))
    assert all("loss" not in row if row["step"] in (5, 7) else np.isfinite(row["loss"]) for row in rows)
    weights = checkpoint.read_weights(folder / "out/DINO/latest")
    assert all(np.isfinite(value).all() for value in weights.values())


def test_a_skipped_step_changes_nothing(folder):
    skip = ["-o", "Global.non_finite.policy=skip", "-o", "Global.save_interval=1it", "-o", "Global.max_train_step=5"]
    assert poisoned(folder, "y * float('nan')", "== 4", *skip).returncode == 0
    after = checkpoint.read_weights(folder / "out/DINO/latest")
    rest = tiny.overrides(Global__max_train_step=4, Global__output_dir=folder / "short")
    assert train(folder, *skip, *rest).returncode == 0
    before = checkpoint.read_weights(folder / "short/DINO/latest")
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)


def test_skipping_ends_after_the_allowed_number(folder):
    done = poisoned(folder, "y * float('nan')", ">= 4", "-o", "Global.non_finite={policy: skip, max_skipped: 2}")
    assert done.returncode == 1
    assert "at step 6" in done.stderr
    assert "2 steps were left out before (max_skipped)" in done.stderr


def test_without_anything_to_fall_back_to_the_run_stops(folder):
    done = poisoned(folder, "y * float('nan')", "== 4", "-o", "Global.non_finite.policy=fall_back")
    assert done.returncode == 1
    assert "error: loss or gradients are not finite at step 4" in done.stderr


def test_unknown_policies_are_refused(folder):
    done = train(folder, "-o", "Global.non_finite.policy=ignore")
    assert done.returncode == 2
    assert "Global.non_finite.policy" in done.stderr
    assert train(folder, "-o", "Global.non_finite.max_skipped=-1").returncode == 2


ON_PROCESS_1 = """
import os
import paddle
from passl.engine import run
from passl.engine.roll_back import RollBack
from passl.engine.trainer import Trainer
from passl.models.vision_transformer import Block
train_step, forward, hooks, now = Trainer.train_step, Block.forward, run._hooks, []
def count(self, batch):
    now[:] = [self.step]
    train_step(self, batch)
def spoil(self, x, *more):
    bad = now and now[0] == 7 and os.environ["PADDLE_TRAINER_ID"] == "1"
    return forward(self, x, *more) * (float("nan") if bad else 1)
class Back:
    def before_train(self, trainer): ...
    def after_step(self, trainer):
        if trainer.step == 5 and "lr_factor" not in trainer.progress:
            raise RollBack("too far", progress={"lr_factor": 0.5})
    def after_train(self, trainer): ...
Trainer.train_step, Block.forward, run._hooks = count, spoil, lambda *more: [*hooks(*more), Back()]
from passl.cli import train_main
train_main()
"""


def test_processes_agree_on_steps_that_one_of_them_cannot_do(folder):
    """One goes back with the other, and leaves the step out that is not finite on the other."""
    job = folder / "job.py"
    job.write_text(ON_PROCESS_1)
    command = ["-c", folder / "pretrain.yaml", *tiny.overrides(DataLoader__Train__sampler__batch_size=2)]
    skipped = launch(folder, job, *command, "-o", "Global.non_finite.policy=skip")
    assert skipped.returncode == 0, skipped.stdout + skipped.stderr
    states = checkpoint.read_states(folder / "out/DINO/latest")
    assert (states["step"], states["progress"]["lr_factor"], states["progress"]["skipped_steps"]) == (LAST_STEP, 0.5, 1)
    stopped = launch(folder, job, *command)
    assert stopped.returncode != 0
    log = "".join(path.read_text(errors="replace") for path in (folder / "launch").rglob("workerlog.0"))
    assert "process 1: the first layer whose output is not finite is teacher.backbone.blocks.0" in log
    assert "process 0:" not in log.split("not finite at step 7")[-1]
    log = "".join(path.read_text(errors="replace") for path in (folder / "launch").rglob("workerlog.1"))
    assert f"last good checkpoint: {folder / 'out/DINO/latest'}" in log, "which the other process saved"


class CastingPrecision(Precision):
    """Half precision on a CPU, where Paddle has none: what is left of it are its names."""

    def __init__(self, level="O0", dtype="float16", grad_scaler=None):
        super().__init__()
        self.level, self.dtype = level, dtype

    def autocast(self):
        return Precision().autocast()


@pytest.fixture
def half_precision_on_cpu(monkeypatch):
    monkeypatch.setattr("passl.engine.build.Precision", CastingPrecision)
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda: True)


def test_falling_back_goes_on_from_the_last_good_checkpoint(folder, half_precision_on_cpu, monkeypatch):
    """float16 fails in step 5, bfloat16 in step 7: the run ends in float32, equal to one that always was."""
    used = []
    forward = Trainer._forward

    def overflow(self, model, part):
        used.append((self.step, str(self.precision)))
        outputs = forward(self, model, part)
        fails = {"float16": 5, "bfloat16": 7}.get(self.precision.dtype) if self.precision.level == "O1" else None
        return {**outputs, "loss": outputs["loss"] * float("inf")} if self.step == fails else outputs

    monkeypatch.setattr(Trainer, "_forward", overflow)
    options = ["Global.non_finite.policy=fall_back", "FP16={level: O1, dtype: float16}"]
    source = load(folder / "pretrain.yaml", options)
    trainer = run.train(run.checked(source, True), source)
    assert trainer.step == LAST_STEP
    assert trainer.progress["precision"] == {"level": "O0", "dtype": "float16"}
    steps = [(step, kind.split(" ")[0]) for step, kind in dict.fromkeys(used)]
    assert (5, "float16") in steps
    assert (4, "bfloat16") in steps
    assert (7, "bfloat16") in steps
    assert (6, "float32") in steps
    assert (8, "bfloat16") not in steps
    log = (folder / "out/DINO/train.log").read_text()
    assert "falling back from float16 (FP16.level O1)" in log
    assert "resuming" in log
    plain = load(folder / "pretrain.yaml", [f"Global.output_dir={folder / 'plain'}"])
    run.train(run.checked(plain, True), plain)
    weights = [checkpoint.read_weights(folder / out / "DINO/latest") for out in ("out", "plain")]
    assert all(weights[0][name].tobytes() == weights[1][name].tobytes() for name in weights[0])


@pytest.mark.parametrize(
    ("level", "dtype", "has_bfloat16", "lower"),
    [
        ("O1", "float16", True, {"level": "O1", "dtype": "bfloat16"}),
        ("O2", "float16", False, {"level": "O0", "dtype": "float16"}),
        ("O2", "bfloat16", True, {"level": "O0", "dtype": "float16"}),
        ("O0", "float16", True, None),
    ],
)
def test_what_comes_after_each_precision(monkeypatch, level, dtype, has_bfloat16, lower):
    monkeypatch.setattr(precision_module.paddle.amp, "is_bfloat16_supported", lambda: has_bfloat16)
    assert CastingPrecision(level, dtype).lower() == lower


def test_master_weights_become_the_weights():
    """A run at level O2 goes on in float32 with what its optimizer kept in full."""
    master, moment = np.float32([1.0001]), np.float32([3])
    weights = {"w": np.float32([1.0]), "b": np.float32([2.0])}
    for state in (
        {"optimizer": "AdamW", "master_weights": {"w": master}, "w_fp32_master_0_moment1_0": moment},
        {"optimizer": "AdamW", "w_fp32_master_0": master, "w_fp32_master_0_moment1_0": moment},
    ):
        got, entries = in_full_precision(weights, state)
        assert got == {"w": master, "b": weights["b"]}
        assert entries == {"optimizer": "AdamW", "w_moment1_0": moment}
    assert in_full_precision(weights, {"w_moment1_0": moment}) == (weights, {"w_moment1_0": moment})


@pytest.mark.smoke
def test_extreme_logits_of_65536_prototypes_do_not_overflow():
    """By construction: logits become float32 before they are divided by a temperature, and lose their maximum before
    the exponential.
    """
    largest = float(np.finfo(np.float16).max)
    rng = np.random.default_rng(0)
    loss = DINOLoss(65536)
    student = rng.choice([-largest, 0, largest], (4, 65536)).astype(np.float16)
    teacher = rng.choice([-largest, 0, largest], (2, 65536)).astype(np.float16)
    logits = paddle.to_tensor(student.astype(np.float32), stop_gradient=False)
    half = logits.astype("float16")
    value = loss(half, paddle.to_tensor(teacher), 0.04)
    value.backward()
    loss.update_center()
    assert value.dtype == paddle.float32
    for tensor in (value, logits.grad, loss.center):
        assert np.isfinite(tensor.numpy()).all()
    # Student and teacher agree on one prototype: certain, and right.
    certain = np.full((4, 65536), -largest, np.float16)
    certain[:, 7] = largest
    sure = DINOLoss(65536)(paddle.to_tensor(certain), paddle.to_tensor(certain[:2]), 0.04)
    assert sure.item() == 0


@pytest.mark.smoke
def test_heads_compute_in_the_precision_of_their_weights():
    """Also on features of half precision: O2 casts the backbone alone."""

    class Half(paddle.nn.Layer):
        def forward(self, x):
            return x.astype("float16")

    network = MultiCropNetwork(Half(), DINOHead(8, out_dim=16, hidden_dim=8, bottleneck_dim=4))
    x = paddle.ones([2, 8])
    assert network([x]).dtype == paddle.float32
    np.testing.assert_array_equal(network([x]).numpy(), network.head(x).numpy())


def test_only_backbones_are_cast_to_half_precision():
    backbone = functools.partial(VisionTransformer, embed_dim=12, depth=1, num_heads=2, img_size=16, patch_size=8)
    dino = DINO(backbone, functools.partial(DINOHead, out_dim=8, hidden_dim=8, bottleneck_dim=4))
    assert dino.half_precision_layers() == [dino.student.backbone]
    probe = LinearProbe(backbone, 3, n_last_blocks=1)
    assert probe.half_precision_layers() == [probe.backbone]
