"""Early stopping: the rule itself, and runs that it ends, whatever interrupts them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from passl import checkpoint
from passl.config import Config, ConfigError
from passl.engine.early_stopping import EarlyStopping, deciding_evaluator
from passl.engine.run import checked
from passl.evaluators import KNN
from passl.log import read_metrics
from tests.engine import tiny
from tests.engine.test_distributed import launch

STUB = """
import os
from passl.engine.evaluation import Measuring
TABLES = {tables}
def measured(self, trainer):
    table = TABLES[int(os.environ.get("PADDLE_TRAINER_ID", 0))]
    return dict(zip(("knn_top1_k20", "student_knn_top1_k20"), table[trainer.epoch]))
Measuring._evaluate = measured
"""
# Teacher and student after each epoch: a best, a better one, then no better one any more.
MEASURED = [(30, 40), (50, 45), (49, 40), (60, 60), (49, 40), (48, 40), (70, 60), (70, 60)]


# --- the rule ---


@pytest.mark.smoke
def test_the_rule_by_hand():
    """The seed's, epochs from 0: (teacher, student) -> best so far, counter, whether it ends there."""
    rule = EarlyStopping(tune_every=1, patience=2, min_epoch=3)
    table = [
        ((30, 40), (30, 0, False)),  # the first is the best, whatever its student
        ((30, 20), (30, 0, False)),  # as good as the best, and above its student
        ((35, 35), (30, 1, False)),  # not above its student
        ((29, 10), (30, 2, False)),  # below the best; patience is over, but epoch 3 is not above min_epoch
        ((29, 10), (30, 3, True)),
    ]
    state = None
    for epoch, ((teacher, student), expected) in enumerate(table):
        assert rule.is_due(epoch)
        state = rule.judged(state, epoch, teacher, student)
        assert tuple(state.values()) == (epoch, *expected)
    assert rule.judged(state, 9, 31, 30)["counter"] == 0
    assert [epoch for epoch in range(25) if EarlyStopping(tune_every=10).is_due(epoch)] == [0, 10, 20]


def end_and_best(rule, measured):
    """The epochs after which a run of these measurements ends (None: not early) and was best, by the rule."""
    state, best = None, None
    for epoch, (teacher, student) in enumerate(measured):
        if not rule.is_due(epoch):
            continue
        state = rule.judged(state, epoch, teacher, student)
        best = epoch if state["counter"] == 0 else best
        if state["stopped"]:
            return epoch, best
    return None, best


def end_and_best_of_prefixes(tune_every, patience, min_epoch, measured):
    """The same by looking at the whole history after each epoch, without any state."""
    tuned = range(0, len(measured), tune_every)
    improved = []
    for epoch in tuned:
        teacher, student = measured[epoch]
        if not improved or (teacher > student and teacher >= measured[improved[-1]][0]):
            improved.append(epoch)
    for epoch in tuned:
        best = max(e for e in improved if e <= epoch)
        without = sum(1 for e in tuned if best < e <= epoch)
        if without >= patience and min_epoch < epoch:
            return epoch, best
    return None, improved[-1]


@pytest.mark.parametrize(("tune_every", "patience"), list(itertools.product([1, 2, 3, 7], [1, 2, 5])))
def test_the_rule_over_a_grid(tune_every, patience):
    rng = np.random.default_rng([tune_every, patience])
    ends = []
    for min_epoch in (0, 1, 4, 9, 100):
        rule = EarlyStopping(tune_every, patience, min_epoch)
        for _ in range(60):
            measured = (rng.integers(0, 12, (60, 2)) * 2.5).tolist()
            expected = end_and_best_of_prefixes(tune_every, patience, min_epoch, measured)
            assert end_and_best(rule, measured) == expected
            ends.append(expected[0])
        falling = [(1, 0)] + [(0, 0)] * 200
        assert rule.earliest_end() == end_and_best(rule, falling)[0]
    assert None in ends
    assert len(set(ends)) > 2


@pytest.mark.parametrize("name", ["tune_every", "patience", "min_epoch"])
def test_wrong_numbers(name):
    with pytest.raises(ValueError, match=rf"{name} \(-1\) must be at least"):
        EarlyStopping(**{name: -1})


# --- configurations that cannot be decided on ---


def knn(**arguments):
    data = SimpleNamespace(labels=np.array([0, 1]), class_names=[])
    return KNN(data, data, **arguments)


@pytest.mark.parametrize(
    ("evaluators", "text"),
    [
        ([], "Evaluators has no KNN. Add {name: KNN, k: [20], models: [teacher, student], train_dataset: ..., "),
        ([knn()], "the KNN in Evaluators needs models: [teacher, student]"),
        (
            [knn(k=[10], models=["student"], temperature=0.1)],
            "needs models: [teacher, student] and k: [10, 20] and temperature: 0.07",
        ),
    ],
)
def test_what_is_missing_is_said(evaluators, text):
    dino = SimpleNamespace(backbones=lambda: {"teacher": None, "student": None})
    with pytest.raises(ConfigError) as error:
        deciding_evaluator(evaluators, dino)
    assert text in str(error.value)
    right = knn(models=["student", "teacher"], k=[5, 20])
    assert deciding_evaluator([*evaluators, right], dino) is right


def test_unknown_keys_and_wrong_types_are_errors(tmp_path):
    config = yaml.safe_load(tiny.PRETRAIN.format(folder=tmp_path))
    config["Global"]["early_stopping"] = {"tune_evry": 3, "patience": "long"}
    with pytest.raises(ConfigError) as error:
        checked(Config(config, {}), training=True)
    assert "Global.early_stopping.tune_evry: EarlyStopping has no such argument. Did you mean 'tune_every'?" in str(
        error.value
    )
    assert 'Global.early_stopping.patience: expected int, got "long"' in str(error.value).replace("'", '"')
    config["Global"]["early_stopping"] = 3
    with pytest.raises(ConfigError, match=r"Global.early_stopping: expected a mapping of arguments, got 3"):
        checked(Config(config, {}), training=True)


def evaluators(folder, **arguments):
    data = {
        s: f"{{name: ImageFolder, root: {folder}/{s}, transform: [Resize: {{size: [16, 16]}}, ToTensor: ]}}"
        for s in ("train", "val")
    }
    more = "".join(f", {key}: {value}" for key, value in arguments.items())
    return f"Evaluators=[{{name: KNN, train_dataset: {data['train']}, val_dataset: {data['val']}{more}}}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early_stopping")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    return folder


RULE = {
    "Global__early_stopping__tune_every": 1,
    "Global__early_stopping__patience": 3,
    "Global__early_stopping__min_epoch": 2,
}


def settings(folder, out):
    return {"Global__output_dir": folder / out, "Global__epochs": len(MEASURED), "Global__save_interval": "2it", **RULE}


def train(folder, out, *more, tables=None, killed_at=None, **values):
    code = tiny.TRAIN if killed_at is None else tiny.KILLED_AT.format(step=killed_at) + tiny.TRAIN
    code = code if tables is None else STUB.format(tables=tables) + code
    options = [
        *tiny.overrides(**{**settings(folder, out), **values}),
        "-o",
        evaluators(folder, models="[teacher, student]"),
    ]
    return tiny.run(code, "-c", folder / "pretrain.yaml", *options, *more)


def eval_rows(out):
    return [row for row in read_metrics(out / "DINO/metrics.jsonl") if row["phase"] == "eval"]


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        ("pretrain", [], "Evaluators has no KNN"),
        ("pretrain", ["Global.eval_during_train=false"], "set Global.eval_during_train: true"),
        ("pretrain", ["Global.early_stopping.patience=0"], "Global.early_stopping: patience (0) must be at least 1"),
        ("probe", [], "it compares teacher and student, and LinearProbe has no student: remove it"),
        ("probe", ["Evaluators.0.models=[student]"], "KNN measures the student, and LinearProbe has none"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_made(folder, tmp_path, config, options, text):
    options = [word for option in ("Global.early_stopping.tune_every=2", *options) for word in ("-o", option)]
    out = tiny.overrides(Global__output_dir=tmp_path / "out")
    done = tiny.run(tiny.TRAIN, "-c", folder / f"{config}.yaml", *out, *options)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert not (tmp_path / "out").exists()


# --- runs ---


@pytest.fixture(scope="module")
def stopped(folder):
    done = train(folder, "stopped", tables=[MEASURED])
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.smoke
def test_a_run_ends_early_and_keeps_its_best(folder, stopped):
    """Epoch 1 is the best, 2, 3 and 4 are not: with patience 3, epoch 4 (the fifth) is the last."""
    run = folder / "stopped/DINO"
    assert end_and_best(EarlyStopping(1, 3, 2), MEASURED) == (4, 1)
    latest, best = (checkpoint.read_states(run / name) for name in ("latest", "best"))
    assert (latest["step"], best["step"]) == (15, 6)
    assert latest["progress"] == {
        "best_metric": 50, "best_epoch": 2, "early_stopping": {"epoch": 4, "best": 50, "counter": 3, "stopped": True},
    }  # fmt: skip
    assert best["progress"]["early_stopping"] == {"epoch": 1, "best": 50, "counter": 0, "stopped": False}
    rows = eval_rows(folder / "stopped")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["early_stopping_counter"] for row in rows] == [0, 0, 1, 2, 3]
    assert [row["early_stopping_stopped"] for row in rows] == [0, 0, 0, 0, 1]
    assert (rows[3]["knn_top1_k20"], rows[3]["student_knn_top1_k20"]) == (60, 60)
    text = (
        "stopping early after epoch 5 of 8: 3 measurements without a new best (patience 3, min_epoch 2); the best is "
    )
    log = (run / "train.log").read_text()
    assert text + "that of epoch 2" in log
    assert "not above its student (60.00000): 2 without a new best (patience 3)" in log


def test_a_stopped_run_is_not_trained_on_unless_told_to(folder, stopped):
    run = folder / "stopped/DINO"
    before = {path.name: path.read_bytes() for path in run.glob("*.pd*")}
    again = train(folder, "stopped", "-o", "Global.checkpoint=auto", tables=[MEASURED])
    assert again.returncode == 0, again.stderr
    assert "this run was stopped early after epoch 5 (3 measurements without a new best, patience 3)" in again.stderr
    assert "[Train]" not in again.stderr
    assert {path.name: path.read_bytes() for path in run.glob("*.pd*")} == before
    longer = ["-o", f"Global.checkpoint={run / 'latest'}", "-o", "Global.early_stopping.patience=6"]
    more = train(folder, "longer", *longer, tables=[MEASURED])
    assert more.returncode == 0, more.stderr
    assert "this run was stopped early after epoch 5; by the present Global.early_stopping it goes on" in more.stderr
    assert [row["early_stopping_counter"] for row in eval_rows(folder / "longer")] == [4, 0, 0]
    assert checkpoint.read_states(folder / "longer/DINO/best")["step"] == 24


def test_without_the_rule_the_largest_value_is_the_best(folder, stopped):
    """Also for the rest of a run that it had stopped."""
    latest = folder / "stopped/DINO/latest"
    done = train(
        folder, "off", "-o", f"Global.checkpoint={latest}", "-o", "Global.early_stopping=null", tables=[MEASURED]
    )
    assert done.returncode == 0, done.stderr
    rows = eval_rows(folder / "off")
    assert [(row["epoch"], "early_stopping_counter" in row) for row in rows] == [(6, False), (7, False), (8, False)]
    assert checkpoint.read_states(folder / "off/DINO/latest")["progress"]["best_metric"] == 70
    assert checkpoint.read_states(folder / "off/DINO/best")["step"] == 21  # the first of equals


@pytest.mark.parametrize("killed_at", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (11, 15))])
def test_killed_and_resumed_it_decides_the_same(folder, stopped, killed_at):
    out = f"killed{killed_at}"
    killed = train(folder, out, tables=[MEASURED], killed_at=killed_at)
    assert killed.returncode == -9, killed.stderr
    workers = {"DataLoader__Train__loader__num_workers": 2}  # which have loaded more than is used
    resumed = train(folder, out, "-o", "Global.checkpoint=auto", tables=[MEASURED], **workers)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("latest", "best"):
        tiny.assert_same_checkpoint(folder / "stopped/DINO" / name, folder / out / "DINO" / name)
    assert eval_rows(folder / out) == eval_rows(folder / "stopped")


def test_all_processes_obey_the_first(folder, stopped):
    """By its own numbers the second would find every epoch the best."""
    script = folder / "disagreeing.py"
    rising = [(50 + epoch, 10) for epoch in range(len(MEASURED))]
    script.write_text(STUB.format(tables=[MEASURED, rising]) + tiny.TRAIN)
    values = {"Global__output_dir": folder / "two", "Global__epochs": 8, "DataLoader__Train__sampler__batch_size": 2}
    options = [*tiny.overrides(**values, **RULE), "-o", evaluators(folder, models="[teacher, student]")]
    done = launch(folder, script, "-c", folder / "pretrain.yaml", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("latest", "best"):
        one, two = (checkpoint.read_states(folder / out / "DINO" / name) for out in ("stopped", "two"))
        assert (one["step"], one["progress"]) == (two["step"], two["progress"])


def test_measured_on_the_run_are_teacher_and_student(folder):
    """The numbers are those of passl-eval on the whole checkpoint, and of either backbone alone."""
    values = {"Global__epochs": 4, "Global__early_stopping__tune_every": 2, "Global__max_num_latest_checkpoint": -1}
    values.update(Global__save_interval=1, Schedules__lr__base=5.0)
    done = train(folder, "real", **values)
    assert done.returncode == 0, done.stderr
    assert "can end a run after epoch 7 at the earliest, and this one has 4 epochs" in done.stderr
    rows = eval_rows(folder / "real")
    assert [(row["epoch"], "early_stopping_counter" in row) for row in rows] == [(1, True), (3, True), (4, False)]
    names = [f"{prefix}knn_top{top}_k{k}" for prefix in ("", "student_") for top in (1, 5) for k in (10, 20, 100, 200)]
    assert set(names) <= set(rows[0])
    network = yaml.safe_load(tiny.PRETRAIN.format(folder=folder))["Model"]["backbone"]
    alone = ["-o", f"Model={network}".replace("'", "")]
    for key, prefix in (("teacher", ""), ("student", "student_")):
        found = evaluate(folder, 3, "[teacher]", *alone, "-o", f"Global.checkpoint_key={key}")
        assert {prefix + name: value for name, value in found.items()} == {
            name: pytest.approx(rows[1][name], abs=1e-4)
            for name in names
            if name.startswith("student_") == bool(prefix)
        }
    found = evaluate(folder, 3, "[student, teacher]")
    assert found == {name: pytest.approx(rows[1][name], abs=1e-4) for name in names}


def evaluate(folder, epoch, models, *more):
    weights = tiny.overrides(
        Global__pretrained_model=folder / f"real/DINO/epoch_{epoch}", Global__output_dir=folder / "e"
    )
    options = [*weights, "-o", "Global.name=e", "-o", evaluators(folder, models=models), *more]
    done = tiny.run(tiny.EVAL, "-c", folder / "pretrain.yaml", *options)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((folder / "e/e/eval.json").read_text())


def test_passl_eval_says_what_it_cannot_compare(folder, stopped):
    network = yaml.safe_load(tiny.PRETRAIN.format(folder=folder))["Model"]["backbone"]
    both = ["-c", folder / "pretrain.yaml", "-o", evaluators(folder, models="[teacher, student]")]
    alone = tiny.run(tiny.EVAL, *both, "-o", f"Model={network}".replace("'", ""))
    assert alone.returncode == 2
    assert (
        "Evaluators.0: KNN measures the student, and VisionTransformer has none: remove it from models; -o "
        "Global.checkpoint_key=student loads the student's weights of a run into it"
    ) in alone.stderr
    weights = tiny.overrides(Global__pretrained_model=folder / "stopped/DINO/best", Global__checkpoint_key="student")
    student = tiny.run(tiny.EVAL, *both, *weights)
    assert student.returncode == 1
    assert "DINO/best (checkpoint_key student) gives one backbone, not teacher and student" in student.stderr


def test_a_measurement_that_failed_is_made_up_for(folder, stopped):
    failing = STUB.format(tables=[[*MEASURED[:1], None]]) + tiny.TRAIN  # epoch 1, the best
    options = [*tiny.overrides(**settings(folder, "failed")), "-o", evaluators(folder, models="[teacher, student]")]
    failed = tiny.run(failing, "-c", folder / "pretrain.yaml", *options)
    assert failed.returncode == 1
    assert checkpoint.read_states(folder / "failed/DINO/latest")["step"] == 6
    resumed = train(folder, "failed", "-o", "Global.checkpoint=auto", tables=[MEASURED])
    assert resumed.returncode == 0, resumed.stderr
    for name in ("latest", "best"):
        tiny.assert_same_checkpoint(folder / "stopped/DINO" / name, folder / "failed/DINO" / name)
    assert eval_rows(folder / "failed") == eval_rows(folder / "stopped")
