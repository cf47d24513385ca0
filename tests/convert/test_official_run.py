"""What stands beside the weights in a file of the official trainer becomes states and a configuration of passl."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from passl.config import load, to_yaml
from passl.convert import convert, load_torch
from passl.convert.conversion import Options, convert_source
from passl.convert.official_run import recipe_of, resume_state
from passl.convert.source import open_source
from passl.engine.run import checked
from tests.convert import sources
from tests.convert.test_conversion import run_state, save
from tests.convert.test_way_back import official_run


def conversion_of(folder, backbone="vit", **head):
    path = save(run_state(backbone, **head), folder)
    return convert_source(open_source(path), Options())


def checked_recipe(arguments, conversion, folder):
    """The configuration, as a run reads it back from the file that is written."""
    (folder / "recipe.yaml").write_text(to_yaml(recipe_of(arguments, conversion)))
    return checked(load(folder / "recipe.yaml"), training=True)


@pytest.mark.smoke
def test_default_arguments_make_the_official_recipe(tmp_path):
    """The defaults of the official trainer, where an old file has no such argument."""
    config = checked_recipe({}, conversion_of(tmp_path), tmp_path)
    assert config["Global"]["epochs"] == 100
    assert config["FP16"] == {"level": "O1"}
    assert config["Optimizer"] == {"name": "AdamW", "clip_norm": 3.0, "clip_mode": "each"}
    assert config["Model"]["freeze_last_layer"] == 1
    assert config["Model"]["backbone"]["drop_path_rate"] == 0.1
    assert config["Model"]["head"]["norm_last_layer"] is True
    schedules = config["Schedules"]
    lr = {"base": 5e-4, "final": 1e-6, "warmup": "10ep", "reference_batch_size": 256}
    assert schedules["lr"] == {"name": "Cosine", **lr}
    assert schedules["weight_decay"] == {"name": "Cosine", "base": 0.04, "final": 0.4}
    assert schedules["teacher_momentum"] == {"name": "Cosine", "base": 0.996, "final": 1.0}
    assert schedules["teacher_temp"]["per_epoch"] is True
    train = config["DataLoader"]["Train"]
    crops = {"global_crops_scale": [0.4, 1.0], "local_crops_scale": [0.05, 0.4], "num_local_crops": 8}
    assert train["dataset"]["transform"] == {"name": "MultiCrop", **crops}
    assert train["sampler"] == {"batch_size": 64}


@pytest.mark.parametrize(("optimizer", "name"), [("sgd", "Momentum"), ("lars", "LARS"), ("adamw", "AdamW")])
def test_arguments_find_their_places(tmp_path, optimizer, name):
    """Those of the published ResNet-50, with strings, tuples and numpy's numbers as files have them."""
    arguments = {
        "optimizer": optimizer, "clip_grad": 0, "use_fp16": False, "lr": np.float64(0.03), "weight_decay": 1e-4,
        "weight_decay_end": 1e-4, "warmup_epochs": 5, "min_lr": 0, "momentum_teacher": 0.99, "teacher_temp": 0.07,
        "warmup_teacher_temp": 0.03, "warmup_teacher_temp_epochs": 50, "norm_last_layer": False, "epochs": 200,
        "freeze_last_layer": 3, "global_crops_scale": (0.14, 1), "local_crops_scale": [0.05, 0.14],
        "local_crops_number": 6, "batch_size_per_gpu": 51, "seed": 7, "num_workers": 3, "data_path": "/data/imagenet",
        "output_dir": "runs/x",
    }  # fmt: skip
    config = checked_recipe(arguments, conversion_of(tmp_path, "resnet", in_dim=32, use_bn=True), tmp_path)
    assert config["Optimizer"] == {"name": name}
    assert config["FP16"] == {"level": "O0"}
    assert config["Global"] == {"device": "auto", "seed": 7, "epochs": 200, "output_dir": "./output"}
    assert config["Model"]["freeze_last_layer"] == 3
    assert config["Model"]["head"]["norm_last_layer"] is False
    assert config["Model"]["head"]["use_bn"] is True
    assert "drop_path_rate" not in config["Model"]["backbone"]
    schedules = config["Schedules"]
    assert (schedules["lr"]["base"], schedules["lr"]["final"], schedules["lr"]["warmup"]) == (0.03, 0.0, "5ep")
    assert (schedules["weight_decay"]["base"], schedules["weight_decay"]["final"]) == (1e-4, 1e-4)
    assert schedules["teacher_momentum"]["base"] == 0.99
    temp = {"base": 0.07, "final": 0.07, "warmup": "50ep", "warmup_start": 0.03, "per_epoch": True}
    assert schedules["teacher_temp"] == {"name": "Cosine", **temp}
    train = config["DataLoader"]["Train"]
    crops = {"global_crops_scale": [0.14, 1.0], "local_crops_scale": [0.05, 0.14], "num_local_crops": 6}
    assert train["dataset"] == {
        "name": "ImageFolder",
        "root": "/data/imagenet",
        "transform": {"name": "MultiCrop", **crops},
    }
    assert (train["sampler"]["batch_size"], train["loader"]["num_workers"]) == (51, 3)


@pytest.mark.parametrize("backbone", sources.BACKBONES)
def test_a_recipe_of_every_backbone_is_accepted(tmp_path, backbone):
    width = sources.BACKBONES[backbone]().embed_dim
    conversion = conversion_of(tmp_path, backbone, in_dim=width)
    config = checked_recipe({"drop_path_rate": 0.2}, conversion, tmp_path)
    assert config["Model"]["backbone"].get("drop_path_rate") == (None if backbone == "resnet" else 0.2)


@pytest.mark.smoke
def test_states_of_the_recorded_runs(reference):
    """Step, epoch, scaler and arguments, whatever the age of the file."""
    for path in sorted(reference.glob("full_*checkpoint*.pth")):
        raw = load_torch(path)
        source = open_source(path)
        states = resume_state(source, convert_source(source, Options())).states
        taken = {int(np.asarray(value["step"]).item()) for value in raw["optimizer"]["state"].values()}
        assert states["step"] == max(taken)
        assert states["epoch"] == raw["epoch"]
        assert states["origin"]["args"] == vars(raw["args"])
        scaler = raw.get("fp16_scaler")
        assert (states["scaler"]["scale"].item() if scaler else states["scaler"]) == (scaler["scale"] if scaler else {})


def test_without_all_of_the_architecture_there_is_no_recipe(reference, tmp_path):
    """A wrong number of heads would train on without a word."""
    path = reference / "full_checkpoint.pth"
    source = open_source(path)
    unknown = convert_source(source, Options()).architecture.unknown
    told = convert_source(source, Options(arguments={"num_heads": 1}))
    assert told.architecture.unknown == ()
    assert resume_state(source, told).recipe["Model"]["backbone"]["num_heads"] == 1
    convert(path, tmp_path / "run")
    assert (tmp_path / "run.pdstates").exists()
    assert (tmp_path / "run.yaml").exists() == (not unknown)


def test_the_epoch_of_clemsgrs_is_the_last_one(tmp_path):
    """Theirs is stored before it is counted up; the official one is the next epoch."""
    file = official_run("adamw", 7, 3, True, use_bn=False)
    source = open_source(save(file, tmp_path))
    assert resume_state(source, convert_source(source, Options())).states["epoch"] == file["epoch"]
    del file["args"]
    file["student"] = {name.replace("module.", ""): value for name, value in file["student"].items()}
    source = open_source(save(file, tmp_path))
    assert resume_state(source, convert_source(source, Options())).states["epoch"] == file["epoch"] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "rmsprop"}, "rmsprop"),
        ({"global_crops_scale": 3}, "official trainer"),
        ({"epochs": "many"}, "official trainer"),
    ],
)
def test_arguments_of_another_trainer_are_said(tmp_path, change, message):
    file = official_run("adamw", 7, 3, True, use_bn=False)
    file["args"] = argparse.Namespace(**{**vars(file["args"]), **change})
    written = convert(save(file, tmp_path), tmp_path / "run")
    assert message in written.notes[0]
    assert not (tmp_path / "run.pdstates").exists()
