"""PyTorch -> Paddle -> PyTorch gives the very tensors back: names, order, types and bits."""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict

import numpy as np
import pytest

from passl import checkpoint
from passl.convert import BFLOAT16, ConversionError, convert, load_safetensors, load_torch
from passl.convert.optimizer_state import from_official, grouped_parameters, to_official
from tests.convert import sources
from tests.convert.sources import assert_same_tensors, classifier, prefixed, state
from tests.convert.test_conversion import run_state, save
from tests.engine.test_official_resume import recorded_checkpoints


def round_trip(path, folder, to="torch", **options):
    """Convert to Paddle, and that to PyTorch or safetensors; returns what is in the last file."""
    convert(path, folder / "paddle/weights", **options)
    suffix = {"torch": ".pth", "safetensors": ".safetensors"}[to]
    convert(folder / "paddle/weights", folder / f"back{suffix}", to=to, arguments=options.get("arguments"))
    if to == "safetensors":
        return load_safetensors(folder / "back.safetensors", bfloat16="bits")
    return load_torch(folder / "back.pth", bfloat16="bits")


def as_type(tensors, kind):
    """The floating-point numbers of ``tensors`` in another type; bfloat16 as its bits."""

    def cast(value):
        if value.ndim == 0:
            return value
        if kind == "bfloat16":
            return (value.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
        return value.astype(kind)

    return {name: cast(value) for name, value in tensors.items()}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("to", ["torch", "safetensors"])
def test_backbones(tmp_path, kind, to):
    for name, build in sources.BACKBONES.items():
        expected = as_type(state(build()), kind)
        found = round_trip(save(expected, tmp_path), tmp_path, to)
        assert_same_tensors(found, expected, in_order=to == "torch")
        assert any(key.endswith("num_batches_tracked") for key in found) == (name in ("resnet", "xcit"))


def test_without_a_file_in_between(tmp_path):
    expected = state(sources.resnet())
    path = save({"state_dict": prefixed("module.", expected)}, tmp_path)
    convert(path, tmp_path / "direct.pth", to="torch")
    assert_same_tensors(load_torch(tmp_path / "direct.pth"), expected)
    convert(path, tmp_path / "direct.safetensors", to="safetensors")
    assert_same_tensors(load_safetensors(tmp_path / "direct.safetensors"), expected, in_order=False)


@pytest.mark.parametrize("use_bn", [False, True])
def test_one_network(tmp_path, use_bn):
    for backbone in ("vit", "xcit"):
        teacher = run_state(backbone, use_bn=use_bn)["teacher"]
        found = round_trip(save({"teacher": teacher}, tmp_path), tmp_path)
        assert list(found) == ["teacher"]
        assert_same_tensors(found["teacher"], teacher)


def test_a_probe_becomes_the_two_files_of_the_official_evaluation(tmp_path):
    backbone, weights = state(sources.resnet()), prefixed("module.linear.", classifier(32))
    linear = save({"epoch": 3, "state_dict": weights}, tmp_path, "linear.pth.tar")
    found = round_trip(linear, tmp_path, backbone=save(backbone, tmp_path, "backbone.pth"))
    assert_same_tensors(found, backbone)
    assert_same_tensors(load_torch(tmp_path / "back_linearweights.pth")["state_dict"], weights)
    found = round_trip(linear, tmp_path)
    assert_same_tensors(found["state_dict"], weights)


# --- whole runs ------------------------------------------------------------------------------------------------------


def assert_equal(found, expected, where="checkpoint"):
    """Equal values in equal containers; numpy's numbers are as good as Python's."""
    if isinstance(expected, argparse.Namespace):
        assert isinstance(found, argparse.Namespace), where
        found, expected = vars(found), vars(expected)
    if isinstance(expected, dict):
        # The optimizer's states lie in the order of their first steps, which says nothing.
        in_order = not where.endswith("optimizer.state")
        assert list(found) == list(expected) if in_order else sorted(found) == sorted(expected), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), where
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_equal(found[index], value, f"{where}.{index}")
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert found.tobytes() == expected.tobytes(), where
    else:
        assert found == expected, where


def recorded_runs(reference):
    paths = [path for path, _ in recorded_checkpoints(reference)]
    return [*paths, *(path for path in sorted(reference.glob("full_*checkpoint*.pth")))]


@pytest.mark.smoke
def test_recorded_runs_come_back_whole(reference, tmp_path):
    """Student, teacher, optimizer, epoch, arguments, centre and scaler: all that the official trainer saved."""
    for path in recorded_runs(reference):
        expected = load_torch(path)
        assert_equal(round_trip(path, tmp_path), expected, path.stem)


def official_run(kind, steps, frozen, as_int, use_bn):
    """A checkpoint of the official trainer, whose optimizer is of a ``kind``."""
    run = run_state("resnet", in_dim=32, use_bn=use_bn)
    trained = [name for name, value in run["student"].items() if not name.endswith(("weight_g", "running_mean",
               "running_var", "num_batches_tracked"))]  # fmt: skip
    shapes = {name: run["student"][name].shape for name in trained}
    is_plain = {name: name.endswith(".bias") or len(shape) == 1 for name, shape in shapes.items()}
    order = sorted(trained, key=lambda name: is_plain[name])
    lengths = [len(trained) - sum(is_plain.values()), sum(is_plain.values())]
    generator = np.random.default_rng(0)

    def tensor(name):
        return generator.random(shapes[name]).astype(np.float32)

    values = {}
    for number, name in enumerate(order):
        taken = steps - frozen if "last_layer" in name else steps
        if not taken:
            continue
        if kind == "adamw":
            step = taken if as_int else np.array(taken, np.float32)
            values[number] = {"step": step, "exp_avg": tensor(name), "exp_avg_sq": tensor(name)}
        else:
            values[number] = {{"sgd": "momentum_buffer", "lars": "mu"}[kind]: tensor(name)}
    groups, first = [], 0
    for length in lengths:
        groups.append(
            {"lr": 0.25, "betas": (0.9, 0.999), "weight_decay": 0.5, "params": [*range(first, first + length)]}
        )
        first += length
    arguments = argparse.Namespace(arch="resnet50", optimizer=kind, epochs=10, global_crops_scale=(0.4, 1.0))
    return {
        "student": OrderedDict(prefixed("module.", run["student"])),
        "teacher": OrderedDict(prefixed("module.", run["teacher"])),
        "optimizer": {"state": values, "param_groups": groups},
        "epoch": 4,
        "args": arguments,
        "dino_loss": OrderedDict(run["dino_loss"]),
    }


@pytest.mark.parametrize(
    ("kind", "steps", "frozen", "as_int"),
    [
        ("adamw", 7, 7, False),
        ("adamw", 7, 3, True),
        ("adamw", 400_000, 9, False),
        ("sgd", 7, 7, False),
        ("lars", 7, 0, True),
    ],
)
def test_runs_of_every_optimizer(tmp_path, kind, steps, frozen, as_int):
    """Also where a step count is too large, or too near to another, to be read off a power of beta."""
    expected = official_run(kind, steps, frozen, as_int, use_bn=True)
    assert_equal(round_trip(save(expected, tmp_path), tmp_path), expected)


def test_steps_are_read_off_the_powers_of_beta(tmp_path):
    """Where nobody counted them: a run of passl itself, whose last layer was frozen at first."""
    file = official_run("adamw", 900, 150, False, use_bn=False)
    conversion = convert(save(file, tmp_path), None).conversion
    trained = [s for s in conversion.layout if s.name.startswith("student.") and not s.name.endswith(("weight_g",
               "_mean", "_variance"))]  # fmt: skip
    entries = from_official(file["optimizer"], trained).entries
    assert sum(map(len, grouped_parameters(trained))) == len(trained)
    back = to_official(entries, trained, 900, {"param_groups": file["optimizer"]["param_groups"]})
    assert_equal(back, file["optimizer"])


def test_a_run_of_passl_without_official_origin(tmp_path):
    """Its groups have PyTorch's defaults; without optimizer and epoch a note says so."""
    run = run_state("vit")
    convert(save({**run, "args": argparse.Namespace()}, tmp_path), tmp_path / "run")
    assert not (tmp_path / "run.pdopt").exists()
    written = convert(tmp_path / "run", tmp_path / "run.pth", to="torch")
    assert any("without optimizer and epoch" in note for note in written.notes)
    found = load_torch(tmp_path / "run.pth")
    assert_same_tensors(found["student"], prefixed("module.", run["student"]))
    assert_same_tensors(found["teacher"], run["teacher"])
    assert sorted(found) == ["dino_loss", "student", "teacher"]
    with pytest.raises(ConversionError, match="--checkpoint-key teacher or student"):
        convert(tmp_path / "run", tmp_path / "run.safetensors", to="safetensors")
    assert not (tmp_path / "run.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.pop("param_groups"), "param_groups"),
        (lambda o: o["param_groups"].pop(), r"groups of \[\d+\] parameters"),
        (lambda o: o["param_groups"][0]["params"].reverse(), "another order"),
        (lambda o: o["state"].update({99: o["state"][0]}), "parameter 99"),
        (lambda o: o["state"][0].pop("exp_avg"), "unknown"),
        (lambda o: o["state"][0].pop("step"), "step"),
        (lambda o: o["state"][0].update(exp_avg=3), "official trainer"),
        (lambda o: o["state"][0].update(exp_avg=np.zeros(5)), r"has shape \[5\]"),
        (lambda o: o["state"].update({0: {"momentum_buffer": o["state"][0]["exp_avg"]}}), "Momentum and AdamW at once"),
        (lambda o: o["state"].update({0: 3}), "official trainer"),
        (lambda o: o["state"].clear(), "has not taken a step"),
    ],
)
def test_an_optimizer_that_does_not_map_is_left_out_and_said(tmp_path, change, message):
    file = official_run("adamw", 7, 3, True, use_bn=False)
    change(file["optimizer"])
    written = convert(save(file, tmp_path), tmp_path / "run")
    assert len(written.notes) == 1
    assert "cannot be continued" in written.notes[0]
    assert re.search(message, written.notes[0]), written.notes
    assert (tmp_path / "run.pdparams").exists()
    assert not (tmp_path / "run.pdstates").exists()
    assert checkpoint.read_weights(tmp_path / "run")["dino_loss.center"].shape == (1, 10)
