"""Training on regions of features, step by step, against a recorded run of clemsgrs' trainer."""

from __future__ import annotations

import functools
import json

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.config import load as load_config
from passl.convert import convert, load_torch
from passl.engine.optim import AdamW
from passl.engine.trainer import Trainer
from passl.models import DINO, DINOHead, RegionTransformer
from passl.schedules import Timeline, cosine
from tests.engine import tiny
from tests.engine.test_trajectories import Recorder, split_null
from tests.models.weights import assert_close, load, to_torch, torch_name

TOLERANCE = 1e-5


@pytest.fixture
def run(reference):
    """The recorded run: its configuration, and the arrays."""
    if not (reference / "hipt_region_run.json").exists():
        pytest.skip("this recording has no hipt_region_run")
    return json.loads((reference / "hipt_region_run.json").read_text()), np.load(reference / "hipt_region_run.npz")


class RecordedViews:
    """Feeds the recorded crops, which are stored view by view."""

    def __init__(self, recorded):
        self.recorded = recorded

    def iterate(self, start, stop):
        for step in range(start, stop):
            batch = {"index": np.arange(self.recorded[f"step{step}/global_f16"].shape[1])}
            for kind in ("global", "local"):
                if f"step{step}/{kind}_f16" in self.recorded:
                    views = self.recorded[f"step{step}/{kind}_f16"].astype("float32")
                    batch[f"{kind}_crops"] = paddle.to_tensor(views.reshape(-1, *views.shape[2:]))
            yield batch


def backbone_arguments(meta, recorded):
    arch = meta["arch"]
    return {
        "in_chans": arch["input_embed_dim"],
        "grid_size": round((recorded["init/backbone.pos_embed"].shape[1] - 1) ** 0.5),
        "embed_dim": arch["output_embed_dim"],
        "depth": arch["depth"],
        "num_heads": arch["num_heads"],
        "mlp_ratio": float(arch["mlp_ratio"]),
    }


def head_arguments(meta):
    model = meta["config"]["model"]
    return {
        "out_dim": model["out_dim"],
        "use_bn": model["use_bn_in_head"],
        "norm_last_layer": model["norm_last_layer"],
        "hidden_dim": meta["arch"]["head_hidden"],
        "bottleneck_dim": meta["arch"]["head_bottleneck"],
    }


def build_trainer(meta, recorded):
    model, training, optim = (meta["config"][part] for part in ("model", "training", "optim"))
    backbone = functools.partial(
        RegionTransformer, **backbone_arguments(meta, recorded), drop_path_rate=model["drop_path_rate"]
    )
    head = functools.partial(DINOHead, **head_arguments(meta))
    method = DINO(backbone, head, freeze_last_layer=training["freeze_last_layer"])
    for network in (method.student, method.teacher):
        load(network, recorded, prefix="init/")
    method.train()
    for name, parameter in method.named_parameters():
        parameter.name = name
    steps = len(recorded["loss"])
    line = Timeline(steps, steps // training["nepochs"], training["batch_size_per_gpu"])
    rates = optim["lr_scheduler"]
    schedules = {
        "lr": cosine(
            line, optim["lr"], rates["min_lr"], warmup=training["warmup_epochs"], reference_batch_size=256
        ),
        "weight_decay": cosine(line, rates["weight_decay"], rates["weight_decay_end"]),
        "teacher_momentum": cosine(line, model["momentum_teacher"], 1.0),
        "teacher_temp": cosine(
            line, model["teacher_temp"], model["teacher_temp"], warmup=model["warmup_teacher_temp_epochs"],
            warmup_start=model["warmup_teacher_temp"], per_epoch=True,
        ),
    }  # fmt: skip
    optimizer = AdamW(method.param_groups(), clip_norm=training["clip_grad"])
    recorder = Recorder(optimizer)
    return Trainer(method, optimizer, RecordedViews(recorded), schedules, line, hooks=[recorder]), recorder


@pytest.mark.smoke
def test_the_recorded_run(run, reference):
    meta, recorded = run
    trainer, recorder = build_trainer(meta, recorded)
    trainer.fit()
    rows = recorder.rows
    assert len(rows) == len(recorded["loss"])
    np.testing.assert_allclose([row["teacher_temp"] for row in rows], recorded["temp"], rtol=1e-12)
    assert_close([row["loss"] for row in rows], recorded["loss"], TOLERANCE, "loss")
    assert_close(np.stack([row["center"] for row in rows]), recorded["center"], TOLERANCE, "center")
    means = [json.loads(line) for line in meta["log"]]
    for row in means:
        epoch = [r for step, r in enumerate(rows) if step // trainer.timeline.steps_per_epoch == row["epoch"]]
        assert_close(np.mean([r["lr"] for r in epoch]), row["train_lr"], 1e-12, "lr")
        assert_close(np.mean([r["wd"][0] for r in epoch]), row["train_wd"], 1e-12, "weight decay")
    snapshot = load_torch(reference / "hipt_region_latest.pt")
    for network in ("student", "teacher"):
        state = {torch_name(name): value for name, value in getattr(trainer.method, network).state_dict().items()}
        assert sorted(state) == sorted(snapshot[network])
        for name, expected in snapshot[network].items():
            actual, _ = split_null(name, to_torch(name, state[name].numpy()), list(state))
            assert_close(actual, split_null(name, expected, list(state))[0], TOLERANCE, f"{network} {name}")
    assert_close(trainer.method.dino_loss.center, snapshot["dino_loss"]["center"], TOLERANCE, "final center")


def test_the_recipe_has_the_settings_of_clemsgrs():
    config = load_config(tiny.ROOT / "configs/dino/dino_hvit_xs_patch256_4096_pt_1n8c_dp_fp16o1.yaml")
    official = load_config(tiny.ROOT / "configs/_base_/dino_pretrain.yaml")
    assert config["Global"]["epochs"] == 125
    assert config["Schedules"] == official["Schedules"]  # with 10 epochs of warm-up
    assert config["Optimizer"] == official["Optimizer"]
    assert config["Model"]["backbone"]["name"] == "hvit_xs"
    assert config["Model"]["head"] == {"name": "DINOHead", "out_dim": 65536, "norm_last_layer": False, "use_bn": False}
    train = config["DataLoader"]["Train"]
    assert train["sampler"]["batch_size"] == 16
    transform = {key: value for key, value in train["dataset"]["transform"].items() if key != "name"}
    assert transform == {"global_crops_scale": 0.875, "local_crops_scale": 0.375, "num_local_crops": 8}
    patches = load_config(tiny.ROOT / "configs/dino/dino_vit_small_patch16_224_pt_patches_1n8c_dp_fp16o1.yaml")
    assert 50 <= patches["Global"]["epochs"] <= 100
    assert patches["Schedules"]["lr"]["warmup"] == "3ep"


CONTINUED = """
Global: {{output_dir: {folder}/out, device: cpu, epochs: {epochs}, print_batch_step: 1, use_visualdl: false}}
Model:
  name: DINO
  backbone: {backbone}
  head: {head}
Schedules:
  lr: {{name: Constant, value: 1e-3}}
  weight_decay: {{name: Constant, value: 0.04}}
  teacher_momentum: {{name: Constant, value: 0.99}}
  teacher_temp: {{name: Constant, value: 0.07}}
Optimizer: {{name: AdamW, clip_norm: 3.0}}
DataLoader:
  Train:
    dataset: {{name: RegionFeatures, root: {folder}/features, transform: {{name: RegionMultiCrop}}}}
    sampler: {{batch_size: {batch_size}}}
    loader: {{num_workers: 0}}
"""


def test_the_converted_snapshot_goes_on(run, reference, tmp_path):
    """On feature files, with the command: one more epoch after those of the snapshot."""
    meta, recorded = run
    convert(reference / "hipt_region_latest.pt", tmp_path / "run")
    training = meta["config"]["training"]
    backbone, batch_size = backbone_arguments(meta, recorded), training["batch_size_per_gpu"]
    steps_per_epoch = len(recorded["loss"]) // training["nepochs"]
    (tmp_path / "features").mkdir()
    rng = np.random.default_rng(0)
    for number in range(steps_per_epoch * batch_size):
        features = rng.normal(size=(256, backbone["in_chans"])).astype(np.float32)
        np.save(tmp_path / f"features/{number}.npy", features)
    text = CONTINUED.format(
        folder=tmp_path,
        epochs=training["nepochs"] + 1,
        backbone=json.dumps({"name": "RegionTransformer", **backbone}),
        head=json.dumps({"name": "DINOHead", **head_arguments(meta)}),
        batch_size=batch_size,
    )
    (tmp_path / "config.yaml").write_text(text)
    done = tiny.run(tiny.TRAIN, "-c", tmp_path / "config.yaml", *tiny.overrides(Global__checkpoint=tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert f"at step {len(recorded['loss'])} (epoch {training['nepochs'] + 1})" in done.stderr
    states = checkpoint.read_states(tmp_path / "out/DINO/latest")
    assert states["step"] == len(recorded["loss"]) + steps_per_epoch
    before, after = (checkpoint.read_weights(tmp_path / prefix) for prefix in ("run", "out/DINO/latest"))
    name = "teacher.backbone.pos_embed"
    assert 0 < np.abs(after[name] - before[name]).max() < 1e-3
