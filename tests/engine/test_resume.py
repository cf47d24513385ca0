"""A run that was killed and resumed ends like one that never stopped, to the last bit."""

from __future__ import annotations

import json

import pytest

from passl import checkpoint
from tests.engine import tiny

# Three steps an epoch of 15 images (batches of 4, the rest dropped); checkpoints every two steps.
LAST_STEP = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.write_images(folder)
    tiny.write_config(folder, tiny.PRETRAIN, "pretrain.yaml")
    return folder


def train(folder, out, *more, killed_at=None, workers=0):
    code = tiny.TRAIN if killed_at is None else tiny.KILLED_AT.format(step=killed_at) + tiny.TRAIN
    options = tiny.overrides(Global__output_dir=folder / out, DataLoader__Train__loader__num_workers=workers)
    return tiny.run(code, "-c", folder / "pretrain.yaml", *options, *more)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    done = train(folder, "whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole/DINO/latest"


@pytest.mark.parametrize(("killed_at", "workers"), [(1, 0), (5, 2), (7, 0)])
def test_killed_and_resumed_run_is_bit_identical(folder, uninterrupted, killed_at, workers):
    out = f"killed{killed_at}"
    killed = train(folder, out, killed_at=killed_at, workers=workers)
    assert killed.returncode == -9, killed.stderr
    resumed = train(folder, out, "-o", "Global.checkpoint=auto", workers=workers)
    assert resumed.returncode == 0, resumed.stderr
    saved = killed_at // 2 * 2
    assert (f"at step {saved}" if saved else "starting anew") in resumed.stderr
    tiny.assert_same_checkpoint(uninterrupted, folder / out / "DINO/latest")
    assert losses(folder / out) == losses(folder / "whole")


def test_going_back_leaves_the_later_steps_behind(folder, uninterrupted):
    """After a return to the first epoch, `auto` goes on with the new branch, and nothing of the old one is lost."""
    keep = ["-o", "Global.save_interval=1", "-o", "Global.max_num_latest_checkpoint=-1"]
    assert train(folder, "back", *keep).returncode == 0
    run = folder / "back/DINO"
    back = train(folder, "back", *keep, "-o", f"Global.checkpoint={run / 'epoch_1'}", killed_at=4)
    assert back.returncode == -9, back.stderr
    assert "held later steps than 3" in back.stderr
    assert {path.name for path in (run / "abandoned-1").glob("*.pdparams")} >= {"epoch_2.pdparams", "epoch_3.pdparams"}
    tiny.assert_same_checkpoint(uninterrupted, run / "abandoned-1/latest")
    again = train(folder, "back", *keep, "-o", "Global.checkpoint=auto")
    assert again.returncode == 0, again.stderr
    assert "at step 3" in again.stderr
    tiny.assert_same_checkpoint(uninterrupted, run / "latest")


def test_another_folders_checkpoint_does_not_overwrite_a_run(folder, uninterrupted):
    assert train(folder, "mine", "-o", "Global.max_train_step=1").returncode == 0
    mine = (folder / "mine/DINO/latest.pdparams").read_bytes()
    done = train(folder, "mine", "-o", f"Global.checkpoint={uninterrupted}")
    assert done.returncode == 0, done.stderr
    assert "held another run" in done.stderr
    assert (folder / "mine/DINO.old-1/latest.pdparams").read_bytes() == mine


@pytest.mark.smoke
def test_resumed_where_the_last_layer_is_unfrozen(folder, uninterrupted):
    """At the end of the first epoch the last layer has no moments yet."""
    by_epoch = ["-o", "Global.save_interval=1"]
    assert train(folder, "unfrozen", *by_epoch, killed_at=4).returncode == -9
    resumed = train(folder, "unfrozen", *by_epoch, "-o", "Global.checkpoint=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 3" in resumed.stderr
    tiny.assert_same_checkpoint(uninterrupted, folder / "unfrozen/DINO/latest")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("killed_at", range(1, LAST_STEP))
def test_killed_at_every_step(folder, uninterrupted, killed_at, workers):
    out = f"slow{killed_at}-{workers}"
    assert train(folder, out, killed_at=killed_at, workers=workers).returncode == -9
    assert train(folder, out, "-o", "Global.checkpoint=auto", workers=workers).returncode == 0
    tiny.assert_same_checkpoint(uninterrupted, folder / out / "DINO/latest")


def losses(out):
    rows = [json.loads(line) for line in (out / "DINO/metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in rows}
    assert len(found) == len(rows), "a step is listed twice"
    return found


def test_resume_of_a_prefix_and_its_errors(folder, uninterrupted):
    gone = train(folder, "other", "-o", f"Global.checkpoint={folder}/nothing/latest")
    assert gone.returncode == 1
    assert "nothing/latest.pdstates" in gone.stderr
    other_batch = train(
        folder,
        "other",
        "-o",
        f"Global.checkpoint={uninterrupted}",
        "-o",
        "DataLoader.Train.sampler.batch_size=5",
    )
    assert other_batch.returncode == 1
    assert "saved with" in other_batch.stderr
    done = train(folder, "other", "-o", f"Global.checkpoint={uninterrupted}")
    assert done.returncode == 0, done.stderr
    assert f"at step {LAST_STEP}" in done.stderr


def test_a_mixed_latest_falls_back_to_the_newest_whole_set(folder, uninterrupted, tmp_path):
    """As after a crash between the renames of `latest`."""
    store = checkpoint.CheckpointStore(tmp_path, max_num_latest=-1)
    for step in (1, 2):
        store.save(f"epoch_{step}", {"w": checkpoint.paddle.ones([2]) * step}, {}, {"step": step})
    (tmp_path / "latest.pdparams").unlink()
    (tmp_path / "latest.pdparams").write_bytes((tmp_path / "epoch_1.pdparams").read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match="not saved together"):
        checkpoint.read_states(tmp_path / "latest")
    assert store.newest_intact() == tmp_path / "epoch_2"
