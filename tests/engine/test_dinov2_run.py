"""Runs of DINOv2 as users start them: resumed, accumulated, recomputed, on two processes, from given weights."""

from __future__ import annotations

import functools

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.convert import ConversionError, convert
from passl.log import read_metrics
from passl.models import VisionTransformer
from tests.engine import dinov2_job, tiny
from tests.engine.test_distributed import TOOL, launch

# Three steps an epoch of 15 images (batches of 4, the rest dropped); checkpoints every two steps.
LAST_STEP = 9
HEAD = "{{name: DINOHead, out_dim: 20, hidden_dim: 12, bottleneck_dim: 8, norm_last_layer: false}}"
TEMPERATURE = "{{name: Cosine, base: 0.07, final: 0.07, warmup: 2ep, warmup_start: 0.04}}"
MASKS = "batch_transform: {{name: BlockMasks, patch_size: 8, mask_ratio: [0.3, 0.8]}}"
PRETRAIN = (
    tiny.PRETRAIN.replace("name: DINO\n", f"name: DINOv2\n  ibot_head: {HEAD}\n")
    .replace("img_size: 16,", "img_size: 16, mask_token: true, num_register_tokens: 1,")
    .replace("reference_batch_size: 256}}", "reference_batch_size: 1024, batch_rule: sqrt}}")
    .replace("{{name: Constant, value: 0.04}}", TEMPERATURE)
    .replace("    sampler:", f"    {MASKS}\n    sampler:")
)
SPOIL = """
from passl.engine.trainer import Trainer
train_step = Trainer.train_step
def spoil(self, batch):
    if self.step == 2:
        batch["global_crops"][0] = float("nan")
    train_step(self, batch)
Trainer.train_step = spoil
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    tiny.write_images(folder)
    tiny.write_config(folder, PRETRAIN, "pretrain.yaml")
    return folder


def train(folder, out, *more, code=tiny.TRAIN, **values):
    options = tiny.overrides(Global__output_dir=folder / out, **values)
    return tiny.run(code, "-c", folder / "pretrain.yaml", *options, *more)


@pytest.fixture(scope="module")
def whole(folder):
    done = train(folder, "whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole/DINOv2"


def command(name, *arguments):
    done = tiny.run(f"from passl.cli import {name}_main; {name}_main()", *arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.smoke
def test_what_a_run_writes(whole):
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["phase"] == "train"]
    assert len(rows) == LAST_STEP
    for row in rows:
        total = row["dino_loss"] + row["ibot_loss"] + 0.1 * row["koleo_loss"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert [row["teacher_temp"] for row in rows] == pytest.approx([0.04 + 0.006 * min(t, 5) for t in range(LAST_STEP)])
    assert max(row["lr"] for row in rows) == pytest.approx(0.05 * np.sqrt(4 / 1024))
    weights = checkpoint.read_weights(whole / "latest")
    for name in ("dino_loss.center", "ibot_loss.center", "student.backbone.mask_token", "teacher.backbone.mask_token"):
        assert np.abs(weights[name]).max() > 0, name


def test_a_resumed_run_is_bit_identical(folder, whole):
    killed = train(folder, "killed", code=tiny.KILLED_AT.format(step=5) + tiny.TRAIN)
    assert killed.returncode == -9, killed.stderr
    resumed = train(folder, "killed", Global__checkpoint="auto", DataLoader__Train__loader__num_workers=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 4" in resumed.stderr
    tiny.assert_same_checkpoint(whole / "latest", folder / "killed/DINOv2/latest")


def test_recomputed_blocks_are_the_same_to_the_last_bit(folder, whole):
    done = train(folder, "recompute", DistributedStrategy__recompute="true")
    assert done.returncode == 0, done.stderr
    tiny.assert_same_checkpoint(whole / "latest", folder / "recompute/DINOv2/latest")


@pytest.mark.slow
def test_micro_batches_are_one_batch(folder):
    """But for KoLeo and Sinkhorn-Knopp, which are of each micro-batch."""
    values = {"Model__koleo_loss_weight": 0, "Model__backbone__drop_path_rate": 0}
    for count in (1, 2):
        done = train(folder, f"accumulated{count}", Global__accum_steps=count, **values)
        assert done.returncode == 0, done.stderr
    tiny.assert_close_runs(folder / "accumulated1/DINOv2", folder / "accumulated2/DINOv2")


def test_a_step_that_is_not_finite_is_left_out(folder):
    done = train(folder, "skip", Global__non_finite__policy="skip", code=SPOIL + tiny.TRAIN)
    assert done.returncode == 0, done.stderr
    assert "this step is left out (1 of at most" in done.stderr
    weights = checkpoint.read_weights(folder / "skip/DINOv2/latest")
    assert all(np.isfinite(value).all() for value in weights.values())


@pytest.mark.smoke
def test_two_processes_are_one_with_twice_the_batch(tmp_path, float64):
    done = launch(tmp_path, dinov2_job.__file__, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for centering in ("softmax", "sinkhorn"):
        expected = dinov2_job.results(centering, slice(None))
        for rank in range(2):
            found = np.load(tmp_path / f"{centering}-{rank}.npz")
            assert sorted(found.files) == sorted(expected)
            for name, value in expected.items():
                if name.startswith(dinov2_job.GRADIENTS):
                    np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
                elif "qkv.bias" not in name:  # of the keys, whose gradient is noise about 0
                    np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_a_run_on_two_processes(folder):
    values = {"Global__max_train_step": 3, "Model__centering": "sinkhorn", "DistributedStrategy__sharding": "true"}
    options = tiny.overrides(Global__output_dir=folder / "two", DataLoader__Train__sampler__batch_size=2, **values)
    done = launch(folder, TOOL, "-c", folder / "pretrain.yaml", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in read_metrics(folder / "two/DINOv2/metrics.jsonl") if row["phase"] == "train"]
    assert len(rows) == 3
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"DataLoader__Train__batch_transform__patch_size": 4},
            "masks [8, 16] must be [images, patches], here [8, 4]: the patch_size of DataLoader.Train.batch_transform "
            "must be that of the backbone, 8",
        ),
        (
            {"DataLoader__Train__dataset__transform__local_crops_size": 12},
            "image height and width (12 x 12) must be multiples of patch_size (8)",
        ),
    ],
)
def test_batches_that_do_not_fit_the_model_are_told_in_a_line(folder, values, message):
    done = train(folder, "wrong", **values)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {message}"


# --- what a run is used for ---


def test_both_backbones_are_evaluated(folder, whole):
    """While a run trains, and afterwards: the same numbers."""
    text = tiny.PROBE.format(folder=folder)
    transform = "[Resize: {size: 16}, ToTensor: {}, Normalize: {}]"
    knn = (
        text[text.index("Evaluators:") :]
        .replace("*eval", transform)
        .replace("[3, 20]", "[3]\n    models: [teacher, student]")
    )
    (folder / "knn.yaml").write_text((folder / "pretrain.yaml").read_text() + knn)
    options = tiny.overrides(Global__output_dir=folder / "evaluated", Global__max_train_step=4)
    done = tiny.run(tiny.TRAIN, "-c", folder / "knn.yaml", *options)
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in read_metrics(folder / "evaluated/DINOv2/metrics.jsonl") if row["phase"] == "eval"][-1:]
    assert {"knn_top1_k3", "student_knn_top1_k3"} <= set(row)
    latest = folder / "evaluated/DINOv2/latest"
    command("eval", "-c", folder / "knn.yaml", *options, "-o", f"Global.pretrained_model={latest}")


def test_a_run_is_converted_exported_predicted_with_and_looked_at(folder, whole):
    with pytest.raises(ConversionError, match="a run of DINOv2, .*: --checkpoint-key teacher, or student"):
        convert(whole / "latest", folder / "run.pth", to="torch")
    convert(whole / "latest", folder / "teacher.pth", to="torch", checkpoint_key="teacher")
    picture = next((folder / "val").rglob("*.png"))
    options = ["-c", folder / "pretrain.yaml", "--image-size", "16", "--knn-bank", folder / "train", "--k", "3"]
    command("export", *options, "--pretrained-model", whole / "latest", "--out", folder / "run.passl")
    assert "class" in command("predict", folder / "run.passl", picture).stdout
    for weights in (whole / "latest", folder / "teacher.pth"):
        out = folder / "attention" / weights.name
        view = ["--image-path", picture, "--image-size", "16", "--set", "num_heads=2", "--output-dir", out]
        command("visualize", "attention", "--pretrained-model", weights, *view)
        assert len(list(out.glob("attn-head*.png"))) == 2


@pytest.fixture(scope="module")
def given(folder):
    """Backbone weights as the published ones are: for images of another size, in PyTorch's format; and the values."""
    paddle.seed(3)
    builder = functools.partial(VisionTransformer, patch_size=8, embed_dim=12, depth=2, num_heads=2, mask_token=True)
    backbone = builder(img_size=40, num_register_tokens=1)
    state = {name: paddle.to_tensor(value) for name, value in backbone.state_dict().items()}
    checkpoint.write(state, folder / "given.pdparams")
    convert(folder / "given.pdparams", folder / "given.pth", to="torch", kind="backbone")
    return {name: value.numpy() for name, value in state.items()}


@pytest.mark.parametrize("file", ["given.pth", "given.pdparams"])
def test_training_goes_on_from_given_weights(folder, given, file):
    out = f"from_{file}"
    values = {"Global__pretrained_model": folder / file, "Schedules__lr__base": 0, "Schedules__lr__final": 0}
    done = train(folder, out, Global__max_train_step=1, **values)
    assert done.returncode == 0, done.stderr
    assert "pos_embed resized from a grid of 5 x 5 to 2 x 2" in done.stderr
    weights = checkpoint.read_weights(folder / out / "DINOv2/latest")
    for which in ("student", "teacher"):
        for name, value in checkpoint.backbone_state(weights, which).items():
            if name != "pos_embed":
                np.testing.assert_array_equal(value, given[name], err_msg=name)
    done = train(folder, f"{out}_on", Global__max_train_step=4, Global__pretrained_model=folder / file)
    assert done.returncode == 0, done.stderr
    weights = checkpoint.read_weights(folder / f"{out}_on/DINOv2/latest")
    assert (weights["student.backbone.mask_token"] != given["mask_token"]).all()
