"""Continued pre-training: what a run starts from, and a backbone that stays as it is while the heads warm up."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.convert import convert
from passl.log import read_metrics
from passl.models import ResNet, VisionTransformer
from tests.engine import tiny
from tests.engine.test_distributed import TOOL, launch

OTHER = {"Model__head__out_dim": 24}
FROZEN = {"Model__freeze_backbone": "100%", "Global__max_train_step": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a run of two steps, and what was made of it: a file of PyTorch's, and one of a backbone alone."""
    folder = tmp_path_factory.mktemp("continued")
    tiny.write_images(folder, train=8)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    done = train(folder, "first", Global__max_train_step=4)
    assert done.returncode == 0, done.stderr
    convert(folder / "first/DINO/latest", folder / "official.pth", to="torch")
    convert(folder / "first/DINO/latest", folder / "backbone.pth", to="torch", checkpoint_key="student")
    state = checkpoint.backbone_state(checkpoint.read_weights(folder / "first/DINO/latest"))
    checkpoint.write({name: paddle.to_tensor(value) for name, value in state.items()}, folder / "backbone.pdparams")
    return folder


def train(folder, out, *more, **values):
    options = tiny.overrides(Global__output_dir=folder / out, **values)
    return tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options, *more)


def backbones(folder, out):
    """{"student" and "teacher": weights} of the newest checkpoint."""
    state = checkpoint.read_weights(folder / out / "DINO/latest")
    return {which: checkpoint.backbone_state(state, which) for which in ("student", "teacher")}


def assert_equal(state, expected):
    assert sorted(state) == sorted(expected)
    for name, value in expected.items():
        assert state[name].tobytes() == value.tobytes(), name


# --- where it starts ---


@pytest.mark.parametrize(
    ("form", "key", "origin"),
    [
        ("official.pth", "teacher", "teacher"),
        ("official.pth", "student", "student"),
        ("first/DINO/latest", "teacher", "teacher"),
        ("first/DINO/latest", "student", "student"),
        ("backbone.pth", "teacher", "student"),
        ("backbone", "teacher", "teacher"),
    ],
)
def test_both_backbones_start_from_one(folder, form, key, origin):
    out = f"{form.replace('/', '_')}_{key}"
    values = {"Global__pretrained_model": folder / form, "Global__checkpoint_key": key, **OTHER, **FROZEN}
    done = train(folder, out, **values)
    assert done.returncode == 0, done.stderr
    assert "30 of 30 keys matched" in done.stderr
    assert "for DINO; its heads begin anew" in done.stderr
    expected = backbones(folder, "first")[origin]
    for which, state in backbones(folder, out).items():
        assert which == origin or not np.array_equal(backbones(folder, "first")[which]["norm.bias"], state["norm.bias"])
        assert_equal(state, expected)


@pytest.mark.parametrize("form", ["first/DINO/latest", pytest.param("official.pth", marks=pytest.mark.smoke)])
def test_heads_of_the_same_shape_come_along(folder, form):
    """Each of the two networks then has its own backbone, and a frozen one keeps it."""
    out = f"whole_{form.replace('/', '_')}"
    done = train(folder, out, Global__pretrained_model=folder / form, **FROZEN)
    assert done.returncode == 0, done.stderr
    assert "a whole DINO: what stands on the backbone, its heads, comes along" in done.stderr
    for which, state in backbones(folder, out).items():
        assert_equal(state, backbones(folder, "first")[which])
    before, after = (checkpoint.read_weights(folder / run / "DINO/latest") for run in ("first", out))
    name = "student.head.last_layer.weight_v"  # frozen in the first epoch
    assert after[name].tobytes() == before[name].tobytes()


@pytest.mark.parametrize("form", ["first/DINO/latest", "official.pth"])
def test_why_heads_do_not_come_along_is_said(folder, form):
    done = train(folder, "heads", Global__pretrained_model=folder / form, Global__max_train_step=1, **OTHER)
    assert done.returncode == 0, done.stderr
    text = "the teacher's backbone of it, for DINO; its heads begin anew (student.head.last_layer.weight_g is [20] in"
    assert text in done.stderr


def test_another_backbone_is_an_error_and_changes_nothing(folder):
    done = train(folder, "none", Global__pretrained_model=folder / "backbone", Model__backbone__depth=3)
    assert done.returncode == 1
    assert "30 of 42 keys matched; 12 missing in the file: blocks.2.norm1.weight" in done.stderr
    assert not (folder / "none/DINO").exists()


@pytest.mark.parametrize("form", ["backbone", "backbone.pth", "first/DINO/latest", "official.pth"])
def test_positions_for_another_image_size_are_resized(folder, form):
    """From 2 x 2 to 4 x 4: the features of an image of 32 px stay what the old network makes of it."""
    values = {"Global__pretrained_model": folder / form, "Model__backbone__img_size": 32, **FROZEN}
    transform = "DataLoader__Train__dataset__transform"
    values.update({f"{transform}__global_crops_size": 32, f"{transform}__local_crops_size": 16})
    done = train(folder, f"large_{form.replace('/', '_')}", **values)
    assert done.returncode == 0, done.stderr
    assert "pos_embed resized from a grid of 2 x 2 to 4 x 4" in done.stderr
    networks = []
    which = "student" if form == "backbone.pth" else "teacher"
    for size, state in (
        (16, backbones(folder, "first")[which]),
        (32, backbones(folder, f"large_{form.replace('/', '_')}")["teacher"]),
    ):
        networks.append(VisionTransformer(size, 8, 3, 12, 2, 2))
        checkpoint.load_weights(networks[-1], state)
    assert networks[1].pos_embed.shape == [1, 17, 12]
    images = paddle.randn([2, 3, 32, 32])
    np.testing.assert_allclose(*(network(images).numpy() for network in networks), rtol=0, atol=2e-6)


# --- heads first ---

WARM_UP = {"Model__freeze_backbone": "5it", "Global__max_train_step": 9, "Global__max_num_latest_checkpoint": -1}


@pytest.fixture(scope="module")
def warmed_up(folder):
    done = train(folder, "warm", Global__pretrained_model=folder / "backbone.pth", **WARM_UP, **OTHER)
    assert done.returncode == 0, done.stderr
    assert "the backbone stays as it is in the first 5 of 18 steps" in done.stderr
    return folder / "warm/DINO"


def test_the_backbone_is_trained_when_the_heads_are_warm(folder, warmed_up):
    rows = [row for row in read_metrics(warmed_up / "metrics.jsonl") if row["phase"] == "train"]
    assert [row["backbone_frozen"] for row in rows] == [1.0] * 5 + [0.0] * 4
    trained = backbones(folder, "warm")
    start = checkpoint.backbone_state(checkpoint.read_weights(folder / "first/DINO/latest"), "student")
    assert all((trained["student"][name] != start[name]).any() for name in start)
    # Its moments have counted four steps, those of the head all nine.
    moments = checkpoint.read(warmed_up / "latest.pdopt")
    for name, steps in (("student.backbone.norm.weight", 4), ("student.head.mlp.0.bias", 9)):
        np.testing.assert_allclose(np.asarray(moments[f"{name}_beta1_pow_acc_0"]), 0.9 ** (steps + 1), rtol=1e-5)


@pytest.mark.parametrize(
    "killed_at", [pytest.param(3, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_it_ends_the_same(folder, warmed_up, killed_at):
    out = f"warm_killed{killed_at}"
    values = {"Global__pretrained_model": folder / "backbone.pth", **WARM_UP, **OTHER}
    code = tiny.KILLED_AT.format(step=killed_at) + tiny.TRAIN
    options = tiny.overrides(Global__output_dir=folder / out, **values)
    assert tiny.run(code, "-c", folder / "pretrain.yaml", *options).returncode == -9
    resumed = train(folder, out, Global__checkpoint="auto", **values)
    assert resumed.returncode == 0, resumed.stderr
    tiny.assert_same_checkpoint(warmed_up / "latest", folder / out / "DINO/latest")


@pytest.mark.parametrize(
    ("clip_mode", "sharding"),
    [pytest.param("each", "true", marks=pytest.mark.smoke), pytest.param("global", "false", marks=pytest.mark.slow)],
)
def test_two_processes_warm_up_as_one(folder, clip_mode, sharding):
    """Where data parallel training wants a gradient of every parameter; in micro-batches; with a shared-out state."""
    values = {
        "Global__pretrained_model": folder / "first/DINO/latest",
        "Model__freeze_backbone": "3it",
        "Model__layer_decay": 0.7,
        "Model__backbone__drop_path_rate": 0,
        "Global__max_train_step": 6,
        "Optimizer__clip_norm": 0.1,
        "Optimizer__clip_mode": clip_mode,
        "DistributedStrategy__sharding": sharding,
        **OTHER,
    }
    runs = []
    for processes in (1, 2):
        values["Global__output_dir"] = folder / f"processes{processes}{clip_mode}"
        values["DataLoader__Train__sampler__batch_size"] = 8 // processes
        values["Global__accum_steps"] = processes
        done = launch(folder, TOOL, "-c", folder / "pretrain.yaml", *tiny.overrides(**values), processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(values["Global__output_dir"] / "DINO")
    tiny.assert_close_runs(*runs)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_frozen_resnet_keeps_its_running_statistics(folder, processes):
    """In two networks that differ, to the last bit, and with moments of the heads only."""
    out = f"resnet{processes}"
    state = {}
    for number, which in enumerate(("student", "teacher")):
        paddle.seed(number)
        network = ResNet((1, 1, 1, 1), False, 4)
        for name, value in network.state_dict().items():
            if name.endswith(("_mean", "_variance")):
                value.set_value(paddle.rand(value.shape) + 0.5)
            state[f"{which}.backbone.{name}"] = value
    whole = train(folder, "resnet_heads", *resnet(), Global__max_train_step=1)
    assert whole.returncode == 0, whole.stderr
    rest = checkpoint.read_weights(folder / "resnet_heads/DINO/latest")
    rest = {name: paddle.to_tensor(value) for name, value in rest.items() if ".backbone." not in name}
    checkpoint.write({**rest, **state}, folder / "resnet.pdparams")
    values = {"Global__pretrained_model": folder / "resnet", "Global__output_dir": folder / out, **FROZEN}
    options = tiny.overrides(**values, DataLoader__Train__sampler__batch_size=8 // processes)
    done = launch(folder, TOOL, "-c", folder / "pretrain.yaml", *resnet(), *options, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a whole DINO" in (done.stderr + done.stdout + "".join(p.read_text() for p in (folder / "launch").iterdir()))
    for which, found in backbones(folder, out).items():
        assert_equal(found, {n: v.numpy() for n, v in part(state, which).items()})
    moments = checkpoint.read(folder / out / "DINO/latest.pdopt")
    assert any(name.startswith("student.head.") for name in moments)
    assert not any(".backbone." in name for name in moments)


def part(state, which):
    prefix = f"{which}.backbone."
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def resnet():
    values = {
        "Model.backbone": "{name: ResNet, depths: [1, 1, 1, 1], width: 4, bottleneck: false}",
        "DataLoader.Train.dataset.transform": json.dumps(
            {"name": "MultiCrop", "global_crops_size": 64, "local_crops_size": 32, "num_local_crops": 2}
        ),
    }
    return [word for key, value in values.items() for word in ("-o", f"{key}={value}")]


def test_what_cannot_be_is_refused_before_anything_is_made(folder):
    for key, value, text in (
        ("freeze_backbone", "1epoch", "Model (DINO): freeze_backbone: duration '1epoch' must look like '10ep'"),
        ("layer_decay", "1.2", "Model (DINO): layer_decay (1.2) must be above 0 and at most 1"),
        ("backbone_lr", "0", "Model (DINO): backbone_lr (0) must be above 0"),
    ):
        done = train(folder, "refused", **{f"Model__{key}": value})
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert not (folder / "refused/DINO").exists()
