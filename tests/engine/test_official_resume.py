"""A checkpoint of the official trainer, converted, goes on as the official run did."""

from __future__ import annotations

import re

import numpy as np
import pytest

from passl import checkpoint
from passl.convert import convert
from tests.engine.test_trajectories import TOLERANCES, build_trainer, split_null
from tests.models.weights import assert_close, to_torch, torch_name


def recorded_checkpoints(reference) -> list:
    """[(path, variant)] of the checkpoints whose next steps are recorded."""
    found = [(path, re.fullmatch(r"traj_(\w+)_checkpoint\d+", path.stem)) for path in reference.glob("traj_*.pth")]
    return sorted((path, match[1]) for path, match in found if match)


def resumed(reference, path, variant, prefix):
    """-> the trainer at the step where the official run stood, its recorder, the recording."""
    convert(path, prefix)
    trainer, recorder, recorded = build_trainer(reference, variant, "f32")
    states = checkpoint.read_states(prefix)
    checkpoint.load_weights(trainer.method, checkpoint.read_weights(prefix))
    trainer.optimizer.load_state_dict(checkpoint.read(checkpoint.with_suffix(prefix, checkpoint.OPTIMIZER)))
    trainer.step = states["epoch"] * trainer.timeline.steps_per_epoch
    assert trainer.step == states["step"] > 0
    return trainer, recorder, recorded


@pytest.mark.smoke
def test_the_next_recorded_steps_agree(reference, tmp_path):
    checkpoints = recorded_checkpoints(reference)
    if not checkpoints:
        pytest.skip("this recording has no traj_*_checkpoint*.pth")
    tolerance = TOLERANCES["f32"]
    for path, variant in checkpoints:
        trainer, recorder, recorded = resumed(reference, path, variant, tmp_path / path.stem)
        first = trainer.step
        trainer.fit()
        rows = recorder.rows
        assert len(rows) == len(recorded["loss"]) - first
        assert_close([r["loss"] for r in rows], recorded["loss"][first:], tolerance["loss"], f"{path.stem} loss")
        center = np.stack([r["center"] for r in rows])
        assert_close(center, recorded["center_after"][first:], tolerance["center"], f"{path.stem} center")
        compare_weights(trainer.method, recorded, tolerance["weight"], path.stem)


def compare_weights(method, recorded, tolerance, what):
    """The last weights of both networks, without those whose true gradient is zero."""
    names = recorded["param_names"].tolist()
    keys = [key for key in recorded.files if re.match(r"final/(student|teacher)/", key)]
    assert keys
    for key in keys:
        _, network, name = key.split("/")
        if not name.endswith("num_batches_tracked"):
            state = {torch_name(n): v for n, v in getattr(method, network).state_dict().items()}
            actual, _ = split_null(name, to_torch(name, state[name].numpy()), names)
            expected, _ = split_null(name, recorded[key], names)
            if expected.size:
                assert_close(actual, expected, tolerance, f"{what} {key}")


def test_a_last_layer_without_moments_starts_from_none(reference, tmp_path):
    """In the first checkpoint it is still frozen: its first step here is its first step, with full bias correction."""
    for path, _ in recorded_checkpoints(reference):
        convert(path, tmp_path / path.stem)
        entries = checkpoint.read(tmp_path / f"{path.stem}.pdopt")
        trained = {key.rpartition("_moment1_0")[0] for key in entries if key.endswith("_moment1_0")}
        states = checkpoint.read_states(tmp_path / path.stem)
        has_moments = "student.head.last_layer.weight_v" in trained
        frozen_epochs = states["origin"]["args"]["freeze_last_layer"]
        assert has_moments == (states["epoch"] > frozen_epochs)
        is_behind = "student.head.last_layer.weight_v" in states["origin"]["steps_behind"]
        assert is_behind == (has_moments and frozen_epochs > 0)
