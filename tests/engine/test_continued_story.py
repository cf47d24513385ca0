"""Continued pre-training from beginning to end: what the plain recipe loses of a network, and the careful one keeps."""

from __future__ import annotations

import pytest

from passl import checkpoint
from passl.log import read_metrics
from tests.engine import tiny

DEMO = tiny.ROOT / "configs/demo/pretrain.yaml"
CAREFUL = {"Model__freeze_backbone": "3ep", "Model__backbone_lr": 0.1, "Model__layer_decay": 0.8}
GUARD = {"Global__guard": "{metric: knn, every: 2ep}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's images, a network that was pre-trained on them, and 500 of one class alone to go on with."""
    folder = tmp_path_factory.mktemp("story")
    drawn = tiny.run("from passl.cli import data_main; data_main()", "demo", "--out", folder / "data")
    assert drawn.returncode == 0, drawn.stderr
    (folder / "own").mkdir()
    (folder / "own/arrow").symlink_to(folder / "data/train/arrow")
    train(folder, "base", folder / "data/train", Global__eval_interval=3)
    return folder


def train(folder, out, images, **values):
    """k-NN on all ten classes, by step."""
    values = {
        "Global__output_dir": folder / out,
        "Global__use_visualdl": "false",
        "DataLoader__Train__dataset__root": images,
        "DataLoader__Train__loader__num_workers": 0,
        "Evaluators__0__train_dataset__root": folder / "data/train",
        "Evaluators__0__val_dataset__root": folder / "data/val",
        **values,
    }
    done = tiny.run(tiny.TRAIN, "-c", DEMO, *tiny.overrides(**values), seconds=1500)
    assert done.returncode == 0, done.stderr
    rows = list(read_metrics(folder / out / "DINO/metrics.jsonl"))
    return {row["step"]: row["knn_top1_k20"] for row in rows if "knn_top1_k20" in row}


def go_on(folder, out, **values):
    start = {"Global__pretrained_model": folder / "base/DINO/latest", "Model__head__out_dim": 500}
    return train(folder, out, folder / "own", Global__epochs=10, Global__eval_interval=5, **start, **values)


@pytest.mark.slow
def test_features_are_lost_without_care_and_kept_with_it(folder):
    naive = go_on(folder, "naive")
    careful = go_on(folder, "careful", **CAREFUL, **GUARD)
    start, last = careful[0], max(careful)
    assert start > 50
    assert naive[last] < start - 3
    assert careful[last] > start - 2
    assert careful[last] > naive[last] + 2


@pytest.mark.slow
def test_the_guard_alone_keeps_what_can_be_kept(folder):
    """At the whole learning rate: it goes back, and what it saves is as good as the start."""
    guarded = go_on(folder, "guarded", **GUARD)
    states = checkpoint.read_states(folder / "guarded/DINO/best")
    assert states["progress"]["best_metric"] == max(guarded.values()) >= guarded[0]
    assert "roll-back 1 of 3" in (folder / "guarded/DINO/train.log").read_text()
