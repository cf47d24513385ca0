"""Runs that begin with weights or whole runs of PyTorch's form."""

from __future__ import annotations

import numpy as np
import pytest

from passl import checkpoint
from passl.convert import convert, load_torch
from tests.engine import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and the checkpoints of a run of 3 epochs, with those of its second in PyTorch's form."""
    folder = tmp_path_factory.mktemp("start")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(Global__max_num_latest_checkpoint="-1"))
    assert done.returncode == 0, done.stderr
    convert(folder / "out/DINO/epoch_2", folder / "official.pth", to="torch")
    return folder


@pytest.mark.smoke
def test_a_run_that_went_through_pytorchs_form_goes_on_as_if_nothing_had_happened(folder):
    official = load_torch(folder / "official.pth")
    assert official["epoch"] == 2
    assert official["student"]["module.head.last_layer.weight_g"].shape == (20, 1)
    assert len(official["optimizer"]["param_groups"]) == 2
    convert(folder / "official.pth", folder / "back")
    resumed = tiny.run(
        tiny.TRAIN,
        "-c",
        folder / "pretrain.yaml",
        *tiny.overrides(Global__checkpoint=folder / "back", Global__output_dir=folder / "resumed"),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stderr
    assert "at step 6 (epoch 3)" in resumed.stderr
    assert "[Train][Epoch 2/3]" not in resumed.stderr
    ours, expected = (checkpoint.read_weights(folder / run / "DINO/latest") for run in ("resumed", "out"))
    assert sorted(ours) == sorted(expected)
    for name in expected:
        np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("form", ["official.pth", "teacher.safetensors", "teacher"])
def test_weights_of_pytorchs_form_are_used_directly(folder, form):
    if form.startswith("teacher"):
        to = "safetensors" if form.endswith(".safetensors") else "torch"
        convert(folder / "official.pth", folder / "teacher", to=to, checkpoint_key="teacher")
    out = folder / f"probe_{form}"
    done = tiny.run(
        tiny.TRAIN,
        "-c",
        folder / "probe.yaml",
        *tiny.overrides(Global__pretrained_model=folder / form, Global__output_dir=out, Global__max_train_step=1),
    )
    assert done.returncode == 0, done.stderr
    assert "30 of 30 keys matched" in done.stderr
    probe = checkpoint.read_weights(out / "LinearProbe/latest")
    teacher = checkpoint.backbone_state(checkpoint.read_weights(folder / "out/DINO/epoch_2"))
    for name, value in teacher.items():
        np.testing.assert_array_equal(probe[f"backbone.{name}"], value, err_msg=name)


def test_a_file_of_pytorch_is_no_checkpoint_yet(folder):
    options = tiny.overrides(Global__checkpoint=folder / "official.pth", Global__output_dir=folder / "none")
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options)
    assert done.returncode == 1
    assert f"passl-convert {folder / 'official.pth'} PREFIX" in done.stderr
    assert not (folder / "none").exists()


def test_other_data_than_that_of_the_official_run_is_said(folder):
    convert(folder / "official.pth", folder / "back")
    options = tiny.overrides(
        Global__checkpoint=folder / "back",
        Global__output_dir=folder / "other",
        DataLoader__Train__sampler__batch_size=3,
        Global__max_train_step=11,
    )
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert "the official run took 6 steps in 2 epochs, here they are 10" in done.stderr
