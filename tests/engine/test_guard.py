"""The guard: its rule, what it measures, and runs that it sends back or ends, whatever interrupts them."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.data.samples import Samples
from passl.engine.feature_watch import decoded, encoded, probe_images, unit_rows
from passl.engine.guard import Guard
from passl.log import read_metrics
from tests.engine import tiny
from tests.engine.test_distributed import launch

# k-NN by step and share of the learning rate (0: whatever it is). Six steps an epoch, measured after each two.
TABLE = {
    0: {0: 50.0},
    2: {0: 52.0},
    4: {1.0: 49.9, 0.5: 51.0, 0.25: 51.5},
    6: {0.5: 40.0, 0.25: 53.0},
    8: {0.25: 52.5},
    10: {0.25: 54.0},
    12: {0.25: 53.0},
}
STUB = """
import os
from passl.engine.evaluation import Measuring
TABLES = {tables}
def measured(self, trainer):
    row = TABLES[int(os.environ.get("PADDLE_TRAINER_ID", 0))][trainer.step]
    value = row.get(trainer.progress.get("lr_factor", 1.0), row.get(0))
    return dict.fromkeys(("knn_top1_k10", "knn_top1_k20"), value)
Measuring._evaluate = measured
"""
KILLED_AGAIN = """
import os, signal
from passl.engine.hooks import LogHook
after_step = LogHook.after_step
def kill(self, trainer):
    after_step(self, trainer)
    if (trainer.step, trainer.progress.get("lr_factor", 1.0)) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
LogHook.after_step = kill
"""
LAST = 12


# --- the rule ---


@pytest.mark.smoke
def test_the_rule_by_hand():
    knn, drift = Guard(metric="knn", max_drop=2, max_rollbacks=2), Guard(max_drift=0.3, on_trip="stop")
    assert [knn.is_good(damage) for damage in (0, 2, 2.01, float("nan"))] == [True, True, False, False]
    assert [drift.is_good(damage) for damage in (0, 0.3, 0.31)] == [True, True, False]
    assert [knn.goes_back(number) for number in range(4)] == [True, True, False, False]
    assert not drift.goes_back(0)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("max_drop", -1, "must be at least 0"),
        ("max_drift", float("nan"), "must be at least 0"),
        ("max_rollbacks", -1, "must be at least 0"),
        ("num_images", 0, "must be at least 1"),
        ("lr_factor", 1, "must be above 0 and below 1: else all would happen again"),
        ("lr_factor", 0, "must be above 0 and below 1"),
    ],
)
def test_wrong_numbers(key, value, text):
    with pytest.raises(ValueError, match=text):
        Guard(**{key: value})


# --- what is measured ---


class Numbered(Samples):
    """Two views of each sample, of which the first tells its number."""

    def __init__(self, length):
        super().__init__(None, [], 100)
        self.length = length

    def __len__(self):
        return self.length

    def describe(self, index):
        return str(index)

    def content(self, index, rng):
        return {"global_crops": np.stack([np.full((1, 2, 2), value, np.float32) for value in (index, -1.0 - index)])}


def test_the_images_are_from_the_whole_data_set_and_the_same_each_time():
    assert probe_images(Numbered(101), 5, 0)[:, 0, 0, 0].tolist() == [0, 25, 50, 75, 100]
    assert probe_images(Numbered(3), 5, 0)[:, 0, 0, 0].tolist() == [0, 1, 2]
    share = Numbered(100)
    share.pool = np.arange(10, 20)
    assert probe_images(share, 2, 0)[:, 0, 0, 0].tolist() == [10, 19]


def test_features_are_kept_as_text():
    features = unit_rows(np.random.default_rng(0).normal(size=(7, 48)))
    kept = decoded(encoded(features), 7)
    assert np.abs(1 - (kept * features).sum(1)).max() < 1e-6
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1)


# --- runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    tiny.write_images(folder, train=8)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    assert train(folder, "first", Global__guard=None, Global__max_train_step=1).returncode == 0
    return folder


def knn(folder):
    data = [f"{{name: ImageFolder, root: {folder}/{s}, transform: [ToTensor: ]}}" for s in ("train", "val")]
    return ["-o", f"Evaluators=[{{name: KNN, k: [10, 20], train_dataset: {data[0]}, val_dataset: {data[1]}}}]"]


def train(folder, out, *more, tables=None, code="", **values):
    code += STUB.format(tables=tables) if tables else ""
    options = {"Global__output_dir": folder / out, "Global__epochs": 2, "Global__save_interval": "1it", **values}
    options = {"Global__guard": "{metric: drift}", **options}
    options = {key: "null" if value is None else value for key, value in options.items()}
    return tiny.run(code + tiny.TRAIN, "-c", folder / "pretrain.yaml", *tiny.overrides(**options), *more)


def rows(out, phase="guard"):
    return [row for row in read_metrics(out / "DINO/metrics.jsonl") if row["phase"] == phase]


GUARD = {"Global__guard": "{metric: knn, every: 2it, max_drop: 2, lr_factor: 0.5, max_rollbacks: 2}"}


@pytest.fixture(scope="module")
def guarded(folder):
    done = train(folder, "guarded", *knn(folder), tables=[TABLE], **GUARD)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.smoke
def test_a_run_goes_back_to_its_best_and_learns_slower(folder, guarded):
    """After step 4 (49.9, best 52 after step 2) and step 6 (40, still back to step 2)."""
    run = folder / "guarded/DINO"
    log = (run / "train.log").read_text()
    for text in (
        "[Guard] step 0: knn_top1_k20 is 50.000, 0.000 points below the best, 50.000 (max_drop 2); this is what is",
        "[Guard] step 4 (epoch 1): knn_top1_k20 is 49.900, 2.100 points below the best, 52.000 (max_drop 2): features "
        "are being lost; roll-back 1 of 2 to the best checkpoint (step 2), and the learning rate from there is 0.5 of "
        "its schedule: going back",
        "[Guard] step 6 (epoch 1): knn_top1_k20 is 40.000, 12.000 points below the best, 52.000 (max_drop 2)",
        "roll-back 2 of 2 to the best checkpoint (step 2), and the learning rate from there is 0.25 of its schedule",
    ):
        assert text in log, text
    found = rows(folder / "guarded")
    assert [row["step"] for row in found] == [0, 2, 4, 6, 8, 10, 12]
    assert [row["knn_top1_k20"] for row in found] == [50, 52, 51.5, 53, 52.5, 54, 53]
    assert [row["damage"] for row in found] == [0, 0, 0.5, 0, 0.5, 0, 1]
    assert [row["rollbacks"] for row in found] == [0, 0, 2, 2, 2, 2, 2]
    assert [row["knn_top1_k10"] for row in rows(folder / "guarded", "eval")] == [52, 51.5, 53, 52.5, 54, 53]
    latest, best = (checkpoint.read_states(run / name) for name in ("latest", "best"))
    assert (latest["step"], best["step"]) == (LAST, 10)
    assert latest["progress"]["lr_factor"] == 0.25
    assert latest["progress"]["best_metric"] == 54
    assert {path.name for path in run.glob("abandoned-*")} == {"abandoned-1", "abandoned-2"}


def test_the_learning_rate_is_the_share_of_the_schedule(folder, guarded):
    assert train(folder, "plain", Global__guard=None).returncode == 0
    whole, share = ([row["lr"] for row in rows(folder / out, "train")] for out in ("plain", "guarded"))
    assert share[:2] == whole[:2]
    np.testing.assert_allclose(share[2:], 0.25 * np.array(whole[2:]), rtol=1e-12)


@pytest.mark.parametrize("at", [(3, 1.0), (3, 0.5), (3, 0.25), (7, 0.25)])
def test_killed_and_resumed_it_decides_the_same(folder, guarded, at):
    out = f"killed{at[0]}_{at[1]}"
    killed = train(folder, out, *knn(folder), tables=[TABLE], code=KILLED_AGAIN.format(at=at), **GUARD)
    assert killed.returncode == -9, killed.stderr
    resumed = train(folder, out, *knn(folder), tables=[TABLE], Global__checkpoint="auto", **GUARD)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("latest", "best"):
        tiny.assert_same_checkpoint(folder / "guarded/DINO" / name, folder / out / "DINO" / name)
    assert rows(folder / out) == rows(folder / "guarded")


def test_all_processes_obey_the_first(folder, guarded):
    """By its own numbers the second would never go back."""
    script = folder / "disagreeing.py"
    rising = {step: {0: 50.0 + step} for step in range(LAST + 1)}
    script.write_text(STUB.format(tables=[TABLE, rising]) + tiny.TRAIN)
    values = {"Global__output_dir": folder / "two", "Global__epochs": 2, "DataLoader__Train__sampler__batch_size": 2}
    options = tiny.overrides(**values, Global__save_interval="1it", **GUARD)
    done = launch(folder, script, "-c", folder / "pretrain.yaml", *options, *knn(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (checkpoint.read_states(folder / out / "DINO/latest")["progress"] for out in ("guarded", "two"))
    assert one == two
    assert rows(folder / "two") == rows(folder / "guarded")


# --- the end of patience ---


def assert_stopped(folder, out, step, best):
    run = folder / out / "DINO"
    latest, kept = (checkpoint.read_states(run / name) for name in ("latest", "best"))
    assert (latest["step"], kept["step"]) == (step, best)
    assert latest["progress"]["guard"]["stopped"] == step
    assert latest["progress"]["best_epoch"] == kept["progress"]["best_epoch"]
    again = train(folder, out, *knn(folder), Global__checkpoint="auto", tables=[TABLE], **STOPPING[out])
    assert again.returncode == 0, again.stderr
    assert f"this run was stopped by Global.guard after step {step} (" in again.stderr
    assert "[Train]" not in again.stderr
    assert checkpoint.read_states(run / "latest") == latest


STOPPING = {
    "stop": {"Global__guard": "{metric: knn, every: 2it, on_trip: stop}"},
    "none": {"Global__guard": "{metric: knn, every: 2it, max_rollbacks: 0}"},
    "once": {"Global__guard": "{metric: knn, every: 2it, max_rollbacks: 1}"},
    "start": {"Global__guard": "{metric: knn, every: 4it, max_rollbacks: 0, max_drop: 0}"},
}


@pytest.mark.parametrize(("out", "step", "best"), [("stop", 4, 2), ("none", 4, 2), ("once", 6, 2), ("start", 4, 0)])
def test_it_stops_and_keeps_the_best(folder, out, step, best):
    done = train(folder, out, *knn(folder), tables=[TABLE], **STOPPING[out])
    assert done.returncode == 0, done.stderr
    text = f"; stopping after {int(out == 'once')} roll-backs. The best weights, of step {best}, are "
    assert text + str(folder / out / "DINO/best") in done.stderr
    assert_stopped(folder, out, step, best)


def test_back_to_the_very_start(folder):
    """The start itself is the best: its checkpoint is there, and is that of the pre-trained weights."""
    table = {**TABLE, 2: {1.0: 10.0, 0.5: 50.0}, 4: {0: 49.0}, 6: {0: 49.0}, 8: {0: 49.0}, 10: {0: 49.0}, 12: {0: 49.0}}
    values = {**GUARD, "Global__pretrained_model": folder / "first/DINO/latest"}
    done = train(folder, "zero", *knn(folder), tables=[table], **values)
    assert done.returncode == 0, done.stderr
    assert "roll-back 1 of 2 to the best checkpoint (step 0)" in done.stderr
    assert "resuming" in done.stderr
    assert [row["step"] for row in rows(folder / "zero")] == [0, 2, 4, 6, 8, 10, 12]
    assert [row["rollbacks"] for row in rows(folder / "zero")] == [1] * 7
    slow = {"Schedules__lr__base": 0.025, "Schedules__lr__final": 5e-6, "Global__guard": None}
    values = {"Global__pretrained_model": folder / "first/DINO/latest", **slow}
    assert train(folder, "slow", **values).returncode == 0
    names = ("zero", "slow")
    one, two = (checkpoint.read_weights(folder / out / "DINO/latest") for out in names)
    for name in one:  # as if it had begun with the lower rate, up to the rounding of two products
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-5, err_msg=name)


# --- drift ---


def drift(folder, out):
    return [row["drift"] for row in rows(folder / out)]


@pytest.mark.smoke
def test_drift_needs_no_labels_and_is_the_angle_of_the_features(folder):
    guard = {"Global__guard": "{metric: drift, every: 1ep, max_drift: 2, num_images: 9}"}
    values = {"Global__pretrained_model": folder / "first/DINO/latest", "Schedules__lr__base": 1, **guard}
    done = train(folder, "drift", **values)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(folder / "drift")] == [0, 6, 12]
    assert abs(drift(folder, "drift")[0]) < 1e-6
    states = {step: checkpoint.read_states(folder / "drift/DINO" / step) for step in ("latest", "best")}
    assert states["best"]["step"] == LAST  # the newest good one
    assert_drift(folder, drift(folder, "drift")[-1])


def assert_drift(folder, found):
    """From the weights of the first and of the last step, on the same views."""
    from passl.config import load as load_config
    from passl.engine import build

    config = load_config(folder / "pretrain.yaml")
    method, loader = build.model(config), build.train_loader(config, 3)
    images = paddle.to_tensor(probe_images(loader.dataset, 9, 3))
    features = []
    for run in ("first", "drift"):
        state = checkpoint.read_weights(folder / run / "DINO/latest")
        checkpoint.load_weights(method.backbone, checkpoint.backbone_state(state))
        method.eval()
        features.append(unit_rows(method.backbone(images).numpy()))
    assert abs(1 - (features[0] * features[1]).sum(1).mean() - found) < 3e-4  # the first are kept in half precision
    assert found > 0.1


def test_a_drifting_run_goes_back_and_resumes_the_same(folder):
    """With a best that k-NN decides on (every step is better than the last): it has to be a good state, too."""
    values = {"Global__pretrained_model": folder / "first/DINO/latest", "Schedules__lr__base": 1}
    values["Global__eval_interval"] = "1it"
    table = {step: {0: 50.0 + step} for step in range(LAST + 1)}
    values["Global__guard"] = "{metric: drift, every: 3it, max_drift: 0.1, max_rollbacks: 9, lr_factor: 0.3}"
    done = train(folder, "drifting", *knn(folder), tables=[table], **values)
    assert done.returncode == 0, done.stderr
    assert "to the best checkpoint" in done.stderr
    assert "[Guard] the checkpoint best stays that of step" in done.stderr  # the student is too far ahead
    assert max(drift(folder, "drifting")) <= 0.1
    assert len(drift(folder, "drifting")) == LAST + 1
    best = checkpoint.read_states(folder / "drifting/DINO/best")
    assert best["progress"]["best_metric"] == 50 + best["step"]
    assert best["progress"]["guard"]["coming"] <= 0.1
    factor = rows(folder / "drifting")[-1]["lr_factor"]
    code = KILLED_AGAIN.format(at=(8, factor))
    killed = train(folder, "drifting_killed", *knn(folder), tables=[table], code=code, **values)
    assert killed.returncode == -9, killed.stderr
    resumed = train(folder, "drifting_killed", *knn(folder), tables=[table], Global__checkpoint="auto", **values)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("latest", "best"):
        runs = [folder / out / "DINO" / name for out in ("drifting", "drifting_killed")]
        tiny.assert_same_checkpoint(*runs)


# --- configurations ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["Global.guard.metric=knn"], "Global.guard: metric knn needs a KNN of the teacher in Evaluators. Add"),
        (["Global.guard.metric=knn", "Global.eval_during_train=false"], "metric knn needs evaluation: set Global.eval"),
        (["Global.guard.metric=loss"], 'Global.guard.metric: expected one of "knn", "drift", got "loss"'),
        (["Global.guard.lr_factor=2"], "Global.guard: lr_factor (2) must be above 0 and below 1"),
        (["Global.guard.every=0.01"], "Global.guard.every (0.01): shorter than one step"),
        (["Global.guard.max_dorp=2"], "Guard has no such argument. Did you mean 'max_drop'?"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_made(folder, tmp_path, options, text):
    words = [word for option in options for word in ("-o", option)]
    done = train(folder, tmp_path / "out", *words)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr.replace("'knn', 'drift', got 'loss'", '"knn", "drift", got "loss"')
    assert not (tmp_path / "out/DINO").exists()


def test_with_early_stopping_the_same_measurement_serves_both(folder):
    """Early stopping decides what is best, and the guard what is lost."""
    counted = """
from passl.engine.evaluation import Measuring
measured, steps = Measuring._evaluate, []
def count(self, trainer):
    steps.append(trainer.step)
    print("measured", steps, flush=True)
    return {**measured(self, trainer), "student_knn_top1_k20": 1.0}
Measuring._evaluate = count
"""
    values = {"Global__early_stopping": "{tune_every: 1, patience: 1, min_epoch: 0}", **GUARD}
    table = {step: {0: 50.0 - step / 10} for step in range(LAST + 1)}
    more = [*knn(folder), "-o", "Evaluators.0.models=[teacher, student]"]
    code = STUB.format(tables=[table]) + counted
    done = train(folder, "both", *more, code=code, **values)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "measured [0, 2, 4, 6, 8, 10, 12]"
    best = checkpoint.read_states(folder / "both/DINO/best")
    assert best["step"] == 6  # the first measurement of early stopping
    assert best["progress"]["guard"]["best"] == 50
