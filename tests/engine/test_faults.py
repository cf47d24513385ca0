"""Mistakes and broken data: found early, said clearly, and nothing is lost."""

from __future__ import annotations

import pytest

from passl import checkpoint
from passl.config import Config
from passl.engine.start import differences
from passl.log import read_metrics
from tests.engine import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(Global__max_train_step=4))
    assert done.returncode == 0, done.stderr
    return folder


def refused(done, *texts):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("Global.print_batch_step=0", "print_batch_step (0) must be at least 1"),
        ("Global.max_num_latest_checkpoint=-2", "max_num_latest_checkpoint (-2)"),
        ("Global.seed=-1", "Global.seed (-1) must be at least 0"),
        ("DataLoader.Train.loader.num_workers=-1", "num_workers (-1)"),
        ("Evaluators=[{name: Classification, dataset: {name: ImageFolder, root: {root}}}]", "DINO has none"),
    ],
)
def test_bad_values_are_found_before_anything_is_made(folder, tmp_path, override, text):
    override = override.replace("{root}", str(folder / "val"))
    out = tiny.overrides(Global__output_dir=tmp_path / "out")
    refused(tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *out, "-o", override), text)
    assert not (tmp_path / "out").exists()


def test_resume_refuses_other_data_and_tells_other_settings(folder, tmp_path):
    resume = tiny.overrides(Global__checkpoint=folder / "out/DINO/latest", Global__output_dir=tmp_path)
    tiny.write_images(tmp_path / "more", train=6)
    other = tiny.overrides(
        DataLoader__Train__dataset__root=tmp_path / "more/train", DataLoader__Train__sampler__batch_size=4
    )
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *resume, *other)
    assert done.returncode == 1
    assert "saved with" in done.stderr
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *resume, *tiny.overrides(Schedules__lr__base=0.01))
    assert done.returncode == 0, done.stderr
    assert "differs from that of the checkpoint: Schedules.lr.base: 0.05 -> 0.01" in done.stderr


def test_another_number_of_processes_is_told_how_to_go_on(folder, tmp_path):
    """The same global batch gives the same samples in the same order (see test_distributed)."""
    done = tiny.run(
        tiny.TRAIN, "-c", folder / "pretrain.yaml", "-o", "Global.checkpoint=auto",
        *tiny.overrides(DataLoader__Train__sampler__batch_size=2),
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        "It took 4 images per step on 1 process(es): on 1, go on with -o DataLoader.Train.sampler.batch_size=4"
        in done.stderr
    )


def test_differences_of_configurations():
    old = {"Global": {"output_dir": "a", "seed": 1}, "Model": {"name": "DINO"}, "Evaluators": [1]}
    new = Config({"Global": {"output_dir": "b", "seed": 2}, "Model": {"name": "DINO", "x": 3}, "Evaluators": [1]}, {})
    assert differences(old, new) == ["Global.seed: 1 -> 2", "Model.x: None -> 3"]


def test_an_evaluator_that_fails_does_not_lose_the_training(folder, tmp_path):
    tiny.write_images(tmp_path, train=1)
    for file in (tmp_path / "val").rglob("*.png"):
        file.write_bytes(b"not an image")
    knn = {
        "name": "KNN",
        "k": [3],
        **{f"{s}_dataset": {"name": "ImageFolder", "root": str(tmp_path / s)} for s in ("train", "val")},
    }
    for data in (knn["train_dataset"], knn["val_dataset"]):
        data["transform"] = [{"Resize": {"size": [16, 16]}}, {"ToTensor": {}}, {"Normalize": {}}]
    options = tiny.overrides(Global__output_dir=tmp_path / "out", Global__save_interval=3, Evaluators=[knn])
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options)
    assert done.returncode == 1
    assert "cannot be read" in done.stderr
    assert checkpoint.read_states(tmp_path / "out/DINO/latest")["step"] == 3


def test_labels_of_a_probe_are_compared(folder, tmp_path):
    probe = ["-c", folder / "probe.yaml", *tiny.overrides(Global__output_dir=tmp_path / "out")]
    refused(
        tiny.run(tiny.TRAIN, *probe, *tiny.overrides(Model__num_classes=2)),
        "DataLoader.Train: a label is 2, and Model.num_classes is 2",
    )
    unlabelled = f"{{name: ImageList, root: {folder}/val, transform: [ToTensor: ]}}"
    for phase in ("Train", "Eval"):
        refused(tiny.run(tiny.TRAIN, *probe, "-o", f"DataLoader.{phase}.dataset={unlabelled}"), f"DataLoader.{phase}")
    (tmp_path / "val").mkdir()
    for name in ("class1", "class2"):
        (tmp_path / "val" / name).symlink_to(folder / "val" / name)
    refused(
        tiny.run(
            tiny.TRAIN, *probe, *tiny.overrides(DataLoader__Eval__dataset__root=tmp_path / "val", Evaluators="null")
        ),
        "its classes are not those of DataLoader.Train",
        "class0",
    )
    assert not (tmp_path / "out").exists()


def test_home_is_expanded(folder, tmp_path):
    options = tiny.overrides(Global__output_dir="~/runs", Global__max_train_step=1)
    done = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options, HOME=str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/DINO/latest.pdparams").is_file()
    assert not (tmp_path / "~").exists()


# Files beyond this size cannot be written, as if the disk were full; at the steps of `while`.
FULL_DISK = """
import resource, signal
from passl.engine.hooks import LogHook
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
after_step = LogHook.after_step
def fill(self, trainer):
    limit = 3000 if {full} else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    after_step(self, trainer)
LogHook.after_step = fill
"""


def full_disk(folder, tmp_path, full):
    code = FULL_DISK.format(full=full) + tiny.TRAIN
    return tiny.run(code, "-c", folder / "pretrain.yaml", *tiny.overrides(Global__output_dir=tmp_path / "out"))


def test_a_full_disk_costs_one_checkpoint_not_the_run(folder, tmp_path):
    done = full_disk(folder, tmp_path, "trainer.step == 4")
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 4 was not saved" in done.stderr
    assert "File too large" in done.stderr
    whole = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(Global__output_dir=tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    tiny.assert_same_checkpoint(tmp_path / "whole/DINO/latest", tmp_path / "out/DINO/latest")
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_disk_that_stays_full_keeps_the_last_whole_checkpoint(folder, tmp_path):
    done = full_disk(folder, tmp_path, "trainer.step > 3")
    assert done.returncode == 1, "the end of the run is not saved"
    assert "error: [Errno 27] step 9, the last one, could not be saved (File too large). Last good" in done.stderr
    assert f"checkpoint: {tmp_path / 'out/DINO/latest'}. Make room, and go on with -o Global.checkpoint=auto" in (
        done.stderr
    )
    assert checkpoint.read_states(tmp_path / "out/DINO/latest")["step"] == 2
    resumed = tiny.run(
        tiny.TRAIN, "-c", folder / "pretrain.yaml",
        *tiny.overrides(Global__output_dir=tmp_path / "out", Global__checkpoint="auto"),
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr


# A clock that is set by years, forth and back, at every look.
CLOCK = """
import itertools, time
real, jumps = time.time, itertools.cycle([0, 3e8, -3e8, 7, -7])
time.time = lambda: real() + next(jumps)
"""


def test_a_clock_that_jumps_changes_nothing(folder, tmp_path):
    runs = []
    for name, code in (("plain", ""), ("jumps", CLOCK)):
        options = tiny.overrides(Global__output_dir=tmp_path / name, DataLoader__Train__loader__num_workers=2)
        done = tiny.run(code + tiny.TRAIN, "-c", folder / "pretrain.yaml", *options, "-o", "Global.use_visualdl=true")
        assert done.returncode == 0, done.stderr
        runs.append(tmp_path / name / "DINO")
    tiny.assert_same_checkpoint(*(run / "latest" for run in runs))
    rows = list(read_metrics(runs[1] / "metrics.jsonl"))
    assert all(0 <= row["batch_cost"] < 60 and 0 <= row["data_wait"] <= 1 for row in rows)
    resumed = tiny.run(
        CLOCK + tiny.TRAIN, "-c", folder / "pretrain.yaml",
        *tiny.overrides(Global__output_dir=tmp_path / "jumps", Global__checkpoint="auto", Global__epochs=3),
    )  # fmt: skip
    assert "at step 9" in resumed.stderr


POWER_LOSS = """
import os
from passl import checkpoint
count, replace = 0, os.replace
def lose(source, target):
    global count
    count += ".pd" in str(target)
    if count == {number}:
        os._exit(9)  # nothing is tidied up
    replace(source, target)
os.replace = lose
"""


def test_power_loss_in_the_first_save(folder, tmp_path):
    """Nothing was saved yet, so there is nothing to refuse: the same command, which a loop repeats, begins anew."""
    options = tiny.overrides(Global__output_dir=tmp_path / "out", Global__checkpoint="auto", Global__max_train_step=3)
    lost = tiny.run(POWER_LOSS.format(number=2) + tiny.TRAIN, "-c", folder / "pretrain.yaml", *options)
    assert lost.returncode == 9, lost.stderr
    assert [path.name for path in (tmp_path / "out/DINO").glob("*.pdparams")] == ["step_2.pdparams"]
    again = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options)
    assert again.returncode == 0, again.stderr
    assert "no checkpoint in" in again.stderr
    assert checkpoint.read_states(tmp_path / "out/DINO/latest")["step"] == 3
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("DINO")] == ["DINO"]


@pytest.mark.parametrize("number", [8, 10])
def test_power_loss_while_saving(folder, tmp_path, number):
    """A set is nine renames (three files, six links), the first one six. test_checkpoint cuts at all of them."""
    options = tiny.overrides(Global__output_dir=tmp_path / "out")
    lost = tiny.run(POWER_LOSS.format(number=number) + tiny.TRAIN, "-c", folder / "pretrain.yaml", *options)
    assert lost.returncode == 9, lost.stderr
    resumed = tiny.run(tiny.TRAIN, "-c", folder / "pretrain.yaml", *options, "-o", "Global.checkpoint=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stderr
    assert any(f"at step {step} " in resumed.stderr for step in (2, 3, 4))
    assert checkpoint.read_states(tmp_path / "out/DINO/latest")["step"] == 9
    assert not list((tmp_path / "out").rglob("*.partial"))
