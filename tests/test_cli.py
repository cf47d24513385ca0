"""The console commands as a user types them."""

from __future__ import annotations

import json

import pytest

from passl import checkpoint
from tests.engine import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    return folder


@pytest.fixture(scope="module")
def pretrained(folder):
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(Global__use_visualdl="true"))
    assert done.returncode == 0, done.stderr
    return folder / "out/DINO/latest"


@pytest.mark.smoke
def test_pretrain_probe_and_evaluate(folder, pretrained):
    assert "[Train][Epoch 1/3][Iter: 0/3] lr: 0.000000, loss: " in pretrained.with_name("train.log").read_text()
    assert checkpoint.read_states(pretrained)["step"] == 9
    assert list(pretrained.parent.glob("vdl/*"))

    probe = tiny.run(tiny.TRAIN, "-c", folder / "probe.yaml", *tiny.overrides(Global__pretrained_model=pretrained))
    assert probe.returncode == 0, probe.stderr
    assert "keys matched" in probe.stderr
    assert "best metric" in probe.stderr
    line = next(line for line in probe.stderr.splitlines() if "[Train][Epoch 1/2][Iter: 0/3]" in line)
    named = ["lr", "top1", "metric", "CELoss", "loss", "batch_cost", "reader_cost", "ips", "max mem", "eta"]
    assert [part.split(":")[0] for part in line.split("] ")[-1].split(", ")] == named
    # The probe's features are the teacher's, whatever was trained on top.
    trained = checkpoint.read_weights(folder / "out/LinearProbe/best")
    teacher = checkpoint.backbone_state(checkpoint.read_weights(pretrained))
    assert sorted(f"backbone.{name}" for name in teacher) == sorted(n for n in trained if n.startswith("backbone."))
    for name, value in teacher.items():
        assert (trained[f"backbone.{name}"] == value).all(), name
    assert {"linear.linear.weight", "linear.linear.bias"} < set(trained)

    scored = tiny.run(
        tiny.EVAL,
        "-c",
        folder / "probe.yaml",
        *tiny.overrides(Global__pretrained_model=folder / "out/LinearProbe/best"),
    )
    assert scored.returncode == 0, scored.stderr
    result = json.loads((folder / "out/LinearProbe/eval.json").read_text())
    assert set(result) == {"top1", "top5", "loss", "knn_top1_k3", "knn_top5_k3", "knn_top1_k20", "knn_top5_k20"}
    rows = (folder / "out/LinearProbe/metrics.jsonl").read_text().splitlines()
    assert result["top1"] == max(json.loads(row)["top1"] for row in rows if '"eval"' in row)


def test_the_saved_configuration_runs_again(folder, pretrained):
    again = tiny.run(
        tiny.TRAIN, "-c", pretrained.with_name("config.yaml"), *tiny.overrides(Global__output_dir=folder / "again")
    )
    assert again.returncode == 0, again.stderr
    tiny.assert_same_checkpoint(pretrained, folder / "again/DINO/latest")


def test_an_earlier_run_is_moved_aside_not_overwritten(folder, pretrained):
    out = tiny.overrides(Global__output_dir=folder / "twice", Global__max_train_step=1)
    for _ in range(2):
        done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *out)
        assert done.returncode == 0, done.stderr
    assert "moved to" in done.stderr
    assert (folder / "twice/DINO.old-1/latest.pdparams").is_file()
    assert (folder / "twice/DINO/latest.pdparams").is_file()


def test_accumulation_is_one_large_batch(folder, pretrained):
    """Loss, centre, EMA and weights of two micro-batches are those of the whole batch, to float32 rounding."""
    whole = folder / "accum1"
    parts = folder / "accum2"
    for out, count in ((whole, 1), (parts, 2)):
        options = tiny.overrides(
            Global__output_dir=out,
            Global__accum_steps=count,
            Model__backbone__drop_path_rate=0,
            Global__max_train_step=6,
        )
        done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options)
        assert done.returncode == 0, done.stderr
    tiny.assert_close_runs(whole / "DINO", parts / "DINO")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            ["Global.epoch=3", "Optimizer.clip_nrom=1"],
            ["Global.epoch", "'epochs'", "Optimizer.clip_nrom", "'clip_norm'"],
        ),
        (["Model.backbone.patch_size=five"], ["-o: Model.backbone.patch_size", "expected", "five"]),
        (["Schedules.lr.warmup=ten"], ["Schedules.lr", "10ep", "ten"]),
        (["Schedules.teacher_temp=null"], ["DINO needs a schedule for teacher_temp"]),
        (["Schedules.wd={name: Constant, value: 1}"], ["Schedules.wd", "nothing in DINO takes it", "weight_decay"]),
        (["FP16.level=O1"], ["FP16.level=O1", "needs a GPU", "-o FP16.level=O0"]),
        (["Global.device=gpu"], ["no GPU", "-o Global.device=cpu"]),
        (["DataLoader.Train.dataset.root=nowhere"], ["DataLoader.Train.dataset", "nowhere"]),
        (["DataLoader.Train.sampler.batch_size=100"], ["DataLoader.Train.sampler", "100"]),
        (["Global.save_interval=0it"], ["Global.save_interval", "shorter than one step"]),
        (["Global.seed"], ["Global.seed", "="]),
        (["Global.accum_steps=0"], ["Global.accum_steps (0) must be at least 1"]),
        (["Global.flags.FLAGS_no_such_flag=1"], ["Global.flags.FLAGS_no_such_flag"]),
    ],
)
def test_configuration_errors_exit_with_2(folder, options, texts):
    arguments = [word for option in options for word in ("-o", option)]
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *arguments)
    assert done.returncode == 2, done.stderr
    for text in texts:
        assert text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "nowhere").exists()


def test_missing_and_misshapen_weights_are_errors(folder, pretrained):
    missing = tiny.run(
        tiny.TRAIN, "-c", folder / "probe.yaml", *tiny.overrides(Global__pretrained_model=folder / "no/file")
    )
    assert missing.returncode == 1
    assert "no/file: no such file (tried .pdparams, .safetensors, .pth" in missing.stderr
    options = tiny.overrides(Global__pretrained_model=pretrained, Model__backbone__embed_dim=24)
    other = tiny.run(tiny.TRAIN, "-c", folder / "probe.yaml", *options)
    assert other.returncode == 1
    assert "cls_token (file [1, 1, 12], layer [1, 1, 24])" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_probe_without_a_trained_head_is_not_scored(folder, pretrained):
    done = tiny.run(tiny.EVAL, "-c", folder / "probe.yaml", *tiny.overrides(Global__pretrained_model=pretrained))
    assert done.returncode == 1
    assert "only a backbone" in done.stderr


def test_the_student_can_be_scored(folder, pretrained):
    code = "from passl.engine import run; load = run.checkpoint.load_weights\n"
    code += "def show(layer, *rest): print('loading', type(layer).__name__); return load(layer, *rest)\n"
    code += "run.checkpoint.load_weights = show\n" + tiny.EVAL
    config = tiny.write_config(folder, tiny.PRETRAIN + tiny.PROBE[tiny.PROBE.index("Evaluators:") :], "both.yaml")
    config.write_text(config.read_text().replace("*eval", "[Resize: {size: [16, 16]}, ToTensor: {}, Normalize: {}]"))
    for key, loaded in (("teacher", "DINO"), ("student", "VisionTransformer")):
        options = tiny.overrides(Global__pretrained_model=pretrained, Global__checkpoint_key=key)
        done = tiny.run(code, "-c", config, *options)
        assert done.returncode == 0, done.stderr
        assert f"loading {loaded}" in done.stdout


def test_check_and_print_config(folder):
    checked = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", "--check", "-o", "Global.seed=x")
    assert checked.returncode == 2
    printed = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", "--print-config", "-o", "Global.seed=7")
    assert printed.returncode == 0
    assert "seed: 7" in printed.stdout
    path = folder / "printed.yaml"
    path.write_text(printed.stdout)
    assert tiny.run(tiny.TRAIN, "-c", path, "--check").returncode == 0


def test_demo_data(tmp_path):
    code = "from passl.cli import data_main; data_main()"
    small = ["--train-per-class", "2", "--val-per-class", "1"]
    done = tiny.run(code, "demo", "--out", tmp_path / "data", *small)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "data").glob("train/*/*.png"))) == 20
    assert "complete already" in tiny.run(code, "demo", "--out", tmp_path / "data", *small).stdout
    other = tiny.run(code, "demo", "--out", tmp_path / "data", *small, "--seed", "1")
    assert other.returncode == 1
    assert "other settings" in other.stderr
