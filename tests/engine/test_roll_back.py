"""Hooks that send a run back to an earlier checkpoint."""

from __future__ import annotations

import pytest

from passl import checkpoint
from passl.config import load
from passl.engine import run
from passl.engine.roll_back import RollBack
from passl.log import read_metrics
from tests.engine import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    return tmp_path


class Back:
    """Goes back once, after step 5."""

    prefix = None

    def __init__(self):
        self.rates = []

    def before_train(self, trainer):
        self.rates.append([])

    def after_step(self, trainer):
        self.rates[-1].append(trainer.values["lr"])
        if trainer.step == 5 and "lr_factor" not in trainer.progress:
            raise RollBack("too far", prefix=self.prefix, progress={"lr_factor": 0.5})

    def after_train(self, trainer):
        pass


@pytest.fixture
def back(monkeypatch):
    hook, hooks = Back(), run._hooks
    monkeypatch.setattr(run, "_hooks", lambda *more: [*hooks(*more), hook])
    return hook


def train(folder, *options):
    source = load(folder / "pretrain.yaml", [*options])
    return run.train(run.checked(source, True), source)


@pytest.mark.smoke
def test_it_goes_on_from_the_last_checkpoint_with_what_the_hook_changed(folder, back):
    trainer = train(folder)
    assert trainer.step == 9
    before, after = back.rates
    assert (len(before), len(after)) == (5, 5)  # steps 1 to 5, and 5 to 9 after the checkpoint of step 4
    assert after[0] == before[4] / 2
    states = checkpoint.read_states(folder / "out/DINO/latest")
    assert states["progress"]["lr_factor"] == 0.5
    log = (folder / "out/DINO/train.log").read_text()
    assert "too far: going back" in log
    assert "at step 4" in log
    steps = [row["step"] for row in read_metrics(folder / "out/DINO/metrics.jsonl")]
    assert steps == list(range(1, 10)), "each step is listed once"


def test_a_given_checkpoint_and_what_came_after_it(folder, back):
    back.prefix = folder / "out/DINO/epoch_1"
    train(folder, "Global.max_num_latest_checkpoint=-1", "Global.save_interval=1it")
    assert [len(rates) for rates in back.rates] == [5, 6]
    assert {path.name for path in (folder / "out/DINO/abandoned-1").glob("*.pdstates")} >= {"latest.pdstates"}


def test_without_a_checkpoint_it_begins_anew(folder, back):
    train(folder, "Global.save_interval=9it")
    assert [len(rates) for rates in back.rates] == [5, 9]


def test_a_run_that_was_sent_back_is_resumed_as_such(folder, back):
    """Killed after the return, it ends as if it had not been."""
    train(folder)
    whole = folder / "out/DINO/latest"
    train(folder, f"Global.output_dir={folder / 'killed'}", "Global.max_train_step=6")
    train(folder, f"Global.output_dir={folder / 'killed'}", "Global.checkpoint=auto")
    tiny.assert_same_checkpoint(whole, folder / "killed/DINO/latest")
