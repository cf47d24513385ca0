"""What `passl-plan` decides, without trials: time as text, images, machines, settings and their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.config import Config, load
from passl.engine import run
from passl.engine.plan import designs, document, estimate, recipe
from passl.engine.plan.budget import GB, PlanError, parse_time, shown_time, time_option
from passl.engine.plan.estimate import Costs, Length, TooShortError
from passl.engine.plan.images import Images, list_text, look
from passl.engine.plan.machine import Machine, machine
from tests.engine import tiny

CPU = Machine("cpu", 1, 8 * GB, 2, True)
GPUS = Machine("gpu", 8, 32 * GB, None, False, "float16")


def images(count=5000, side=48, **more):
    return Images({"name": "ImageList", "root": "/data"}, count, side, side, 100, **more)


def choices(images, machine, level=0, batch_size=32, epochs=20, **more):
    design = designs.sized(level, images.side)
    length = Length(epochs, None, epochs, 60.0, False)
    return recipe.Choices(images, machine, design, batch_size, 1, 1, "because", length, 3600.0, 0, "./output/x", **more)


# --- time ---


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45m", 2700), ("12h", 43200), ("1h30m", 5400), ("2d", 172800), ("1.5 h", 5400), ("20 min", 1200)],
)
def test_times_that_people_write(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "12", "h", "-3h", "3x", "1h foo", "0h", "nan", "inf", "0s", "99999d", "1e3h"])
def test_other_texts_are_no_times(text):
    with pytest.raises(PlanError, match=r"must be more than nothing|write a number with a unit"):
        parse_time(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (45, "45 s"), (60, "1 min"), (7500, "2 h 5 min"), (43200, "12 h"), (97200, "1 d 3 h")],
)
def test_times_as_they_are_shown(seconds, text):
    assert shown_time(seconds) == text


@pytest.mark.parametrize("seconds", [0.5, 59.2, 200, 10_799, 1e5, 1e7])
def test_an_advised_time_is_long_enough(seconds):
    assert seconds <= parse_time(time_option(seconds)) <= 2 * seconds + 1


# --- images ---


@pytest.mark.smoke
def test_class_folders_give_images_for_knn(tmp_path):
    tiny.write_images(tmp_path, train=20, val=4)
    (tmp_path / "val").rename(tmp_path / "other")
    found = look(str(tmp_path / "train"))
    assert (found.count, found.height, found.width) == (60, 24, 24)
    assert found.dataset == {"name": "ImageList", "root": str(tmp_path / "train")}
    bank, validation = (labelled_paths(rows) for rows in (found.labelled.bank, found.labelled.validation))
    assert (len(bank), len(validation)) == (48, 12)
    assert not set(bank) & set(validation)
    for path, label, name in found.labelled.bank:
        assert name == f"class{label}" == Path(path).parent.name


def labelled_paths(rows):
    return [path for path, _, _ in rows]


def test_a_validation_folder_is_used(tmp_path):
    tiny.write_images(tmp_path, train=10, val=4)
    found = look(str(tmp_path))
    assert found.dataset["root"] == str(tmp_path / "train")
    assert found.count == 30
    assert len(found.labelled.bank) == 30
    assert {Path(path).parents[1] for path in labelled_paths(found.labelled.validation)} == {tmp_path / "val"}


@pytest.mark.parametrize("layout", ["flat", "deep"])
def test_folders_of_any_kind(tmp_path, layout):
    for number in range(30):
        folder = tmp_path / ("." if layout == "flat" else f"{number % 2}/{number % 3}/x")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{number}.jpg", 40, 64)
    found = look(str(tmp_path))
    assert (found.count, found.height, found.width, found.side) == (30, 40, 64, 40)
    assert (found.labelled is None) == (layout == "flat")


def write(path, height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_a_list_with_labels(tmp_path):
    for number in range(40):
        write(tmp_path / f"{number}.png", 16, 16)
    lines = [f"{number}.png,{'ab'[number % 2]}" for number in range(40)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    found = look(str(tmp_path / "list.csv"))
    assert found.dataset == {"name": "ImageList", "list_file": str(tmp_path / "list.csv")}
    assert found.labelled.classes == 2


def test_lists_are_read_back(tmp_path):
    from passl.data.datasets import ImageList

    rows = [(str(tmp_path / 'a, "b".png'), 1, 'x, "y"'), (str(tmp_path / "b.png"), 0, "z")]
    (tmp_path / "list.csv").write_text(list_text(rows))
    read = ImageList(list_file=tmp_path / "list.csv")
    assert [(path, label) for path, label in zip(read.paths, read.labels)] == [row[:2] for row in rows]


def test_unreadable_images_are_counted_and_allowed_for(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number}.png", 16, 16)
    for number in range(5):
        (tmp_path / f"bad{number}.png").write_bytes(b"no image")
    found = look(str(tmp_path))
    assert (found.count, found.readable, len(found.bad)) == (25, 20, 5)
    settings = {setting.key: setting for setting in recipe.settings(choices(found, CPU, batch_size=8))}
    allowed = settings["DataLoader.Train.dataset.max_bad_samples"]
    assert allowed.value == 20
    assert "5 of 25 images looked at cannot be read" in allowed.reason


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "contains no images, nor do its sub-folders"),
        (["a.png"], "1 readable image(s). DINO compares images with each other and needs at least 8"),
        (["a.txt"], "contains no images"),
        (["bad.png"] * 1, "none of the 1 images that were looked at can be read, such as"),
    ],
)
def test_nothing_to_train_on(tmp_path, names, message):
    for name in names:
        if name == "a.png":
            write(tmp_path / name, 16, 16)
        else:
            (tmp_path / name).write_text("no image")
    with pytest.raises(PlanError) as error:
        look(str(tmp_path))
    assert message in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="is not there. Give a folder of images"):
        look(str(tmp_path / "nothing"))


# --- machines ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 0}, "--gpus 0 must be more than 0"),
        ({"gpus": -2, "gpu_memory": 8}, "--gpus -2 must be more than 0"),
        ({"gpus": 1, "gpu_memory": 0}, "--gpu-memory 0 must be more than 0"),
        ({"gpus": 1, "gpu_memory": float("nan")}, "--gpu-memory nan is too much"),
        ({"cpu": True, "memory": -1.0}, "--memory -1 must be more than 0"),
        ({"cpu": True, "gpus": 1}, "--cpu and --gpus / --gpu-memory exclude each other"),
        ({"gpus": 8}, "--gpus 8: this machine has 0. Say how much memory each has: --gpu-memory 32"),
        ({"gpus": 8, "gpu_memory": 32, "memory": 2}, "--memory is for --cpu: give --gpu-memory"),
    ],
)
def test_machines_that_make_no_sense(arguments, message):
    with pytest.raises(PlanError) as error:
        machine(**arguments)
    assert message in str(error.value)


def test_this_cpu_and_gpus_elsewhere():
    here = machine(cpu=True, memory=2)
    assert (here.device, here.processes, here.is_here, here.memory) == ("cpu", 1, True, 2 * GB)
    assert machine(cpu=True).memory > 0
    there = machine(gpus=4, gpu_memory=16)
    assert (there.device, there.processes, there.is_here, there.memory) == ("gpu", 4, False, 16 * GB)


# --- length ---


def test_the_longest_run_that_fits():
    found = estimate.length(Costs(10, 0.5, 1.0, 20.0), steps_per_epoch=100, budget=3600, most_epochs=1000)
    assert 55 <= found.epochs <= 64
    assert found.seconds <= 0.9 * 3600
    assert found.seconds + 51 > 0.8 * 3600
    assert 1 <= found.epochs / found.eval_every <= 21
    assert not found.is_capped
    assert estimate.length(Costs(10, 0.5, 1.0, 0.0), 100, 3600, 7).epochs == 7


@pytest.mark.parametrize("budget", [60, 100, 1000, 1e5])
def test_evaluations_and_saves_stay_within_the_budget(budget):
    for costs in (Costs(5, 0.01, 0.2, 30.0), Costs(5, 0.3, 8.0, 1.0), Costs(1, 0.001, 0.01, 0.01)):
        found = estimate.length(costs, 7, budget, 100_000)
        assert found.seconds <= 0.9 * budget


def test_too_short_says_how_long_an_epoch_takes():
    with pytest.raises(TooShortError) as error:
        estimate.length(Costs(10, 1.0, 1.0, 0.0), 100, 60, 1000)
    assert error.value.seconds == pytest.approx(111 / 0.9)
    assert estimate.length(Costs(10, 1.0, 1.0, 0.0), 100, error.value.seconds + 0.1, 1000).epochs == 1


# --- settings ---


def test_gpus_and_imagenet_get_the_official_recipe():
    c = choices(images(1_281_167, 400), GPUS, level=3, batch_size=64, epochs=100)
    config = document.config_of(recipe.settings(c))
    official = load("configs/dino/dino_deit_small_patch16_224_pt_in1k_1n8c_dp_fp16o1.yaml")
    assert config["Schedules"]["lr"] == official["Schedules"]["lr"]
    for name in ("weight_decay", "teacher_momentum"):
        assert config["Schedules"][name] == official["Schedules"][name], name
    assert config["Schedules"]["teacher_temp"] == {"name": "Constant", "value": 0.04}
    assert config["Optimizer"] == official["Optimizer"]
    assert config["Model"]["backbone"] == {**official["Model"]["backbone"], "img_size": 224}
    assert config["Model"]["head"] == official["Model"]["head"]
    for name in ("freeze_last_layer", "student_temp"):
        assert config["Model"][name] == official["Model"][name]
    crops = official["DataLoader"]["Train"]["dataset"]["transform"]
    assert config["DataLoader"]["Train"]["dataset"]["transform"] == crops
    assert config["FP16"]["level"] == "O1"


@pytest.mark.parametrize(
    ("count", "expected"), [(10, 256), (5000, 512), (10_000, 1024), (50_000, 4096), (500_000, 65536), (10**7, 65536)]
)
def test_prototypes_follow_the_number_of_images(count, expected):
    assert recipe.out_dim(count) == expected


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "momentum"),
    [(1_281_167, 64, 100, 0.996), (50_000, 32, 300, 0.9995), (5000, 4, 3, 0.9893), (100, 1, 1, 0.9)],
)
def test_the_teacher_is_slow_for_small_batches_and_not_too_slow_for_the_run(count, batch, epochs, momentum):
    settings = recipe.settings(choices(images(count, 224), GPUS, 3, batch, epochs))
    value = next(setting.value for setting in settings if setting.key == "Schedules.teacher_momentum")
    assert value["base"] == momentum


def test_small_runs_get_what_keeps_them_from_collapse():
    c = choices(images(10_000, 32), CPU, 0, 32, 18)
    config = document.config_of(recipe.settings(c))
    found = load("configs/dino/dino_vit_cifar10_patch4_32_pt.yaml")
    for key in ("name", "embed_dim", "depth", "patch_size", "init_std"):
        assert config["Model"]["backbone"][key] == found["Model"]["backbone"][key]
    assert config["Model"]["head"]["use_bn"] is True
    assert config["Model"]["freeze_last_layer"] == 18
    assert config["Schedules"]["lr"]["base"] == found["Schedules"]["lr"]["base"]
    crops = config["DataLoader"]["Train"]["dataset"]["transform"]
    expected = found["DataLoader"]["Train"]["dataset"]["transform"]
    for key in ("global_crops_size", "local_crops_size", "num_local_crops", "global_crops_scale", "local_crops_scale"):
        assert crops[key] == expected[key], key


@pytest.mark.parametrize("side", [8, 24, 32, 48, 64, 96, 150, 224, 3000])
@pytest.mark.parametrize("level", range(len(designs.SIZES)))
@pytest.mark.parametrize("is_dense", [False, True])
def test_views_are_multiples_of_the_patch_size(side, level, is_dense):
    design = designs.sized(level, side, is_dense=is_dense)
    assert design.global_size % design.patch_size == design.local_size % design.patch_size == 0
    assert 0 < design.local_size <= design.global_size <= max(side, 16)
    assert design.global_size // design.patch_size >= 4


@pytest.mark.parametrize("arch", ["vit_base", "resnet50", "xcit_small_12_p16", "dinov2_vit_small", "ResNet"])
@pytest.mark.parametrize("device", [CPU, GPUS])
def test_every_backbone_gives_a_configuration_that_passes(arch, device, tmp_path):
    known = images(30_000, 300, labelled=None, no_labels="none")
    design = designs.named(arch, known.side, None, False)
    c = replace(choices(known, device, epochs=300), design=design)
    text = document.yaml_text(recipe.settings(c), ["made by a test"])
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    run.checked(load(path), training=True)


@pytest.mark.parametrize(
    ("arch", "patch", "message"),
    [
        ("vit_smal", None, "Did you mean 'vit_small'?"),
        ("resnet50", 8, "--arch resnet50 takes no --patch-size"),
        ("hvit_xs", None, "it is for features of regions, not images"),
    ],
)
def test_backbones_that_cannot_be_planned_with(arch, patch, message):
    with pytest.raises(PlanError) as error:
        designs.named(arch, 224, patch, False)
    assert message in str(error.value)


# --- the file ---


def test_the_file_is_the_settings_and_says_why(tmp_path):
    hostile = "/data/a\n  evil: true # 'x\u2028y"
    known = replace(images(), dataset={"name": "ImageList", "root": hostile}, no_labels=hostile)
    settings = recipe.settings(choices(known, CPU))
    text = document.yaml_text(settings, [f"Made for {hostile}", "and checked"])
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    read = load(path)
    assert dict(read) == document.config_of(settings)
    assert read["DataLoader"]["Train"]["dataset"]["root"] == hostile
    for setting in settings:
        if setting.reason:
            assert setting.reason.split("\n")[0][:20] in " ".join(text.replace("#", " ").split()), setting.key
    run.checked(Config(read, {(): "plan"}), training=True)


def test_every_decision_of_the_issue_has_a_reason():
    settings = {setting.key: setting for setting in recipe.settings(choices(images(), CPU))}
    for key in (
        "Global.epochs", "Model.backbone", "Model.head.out_dim", "Model.freeze_last_layer", "Schedules.lr",
        "Schedules.weight_decay", "Schedules.teacher_momentum", "Schedules.teacher_temp", "Model.student_temp",
        "DataLoader.Train.sampler.batch_size", "DataLoader.Train.loader.num_workers",
    ):  # fmt: skip
        assert len(settings[key].reason) > 5, key
    lines = document.table(list(settings.values()), 100)
    assert lines[0].split() == ["setting", "value", "why"]
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize(("rule", "shown"), [({}, "* batch/1024"), ({"batch_rule": "sqrt"}, "* sqrt(batch/1024)")])
def test_the_table_shows_how_a_rate_follows_the_batch(rule, shown):
    value = {"name": "Cosine", "base": 0.004, "final": 1e-6, "reference_batch_size": 1024, **rule}
    row = document.table([recipe.Setting("Schedules.lr", value, "as the official one")], 100)[-1]
    assert f"0.004 {shown} -> 1e-06" in row
