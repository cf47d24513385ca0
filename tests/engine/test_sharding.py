"""Optimizer state in shares: the same steps and the same checkpoint, whoever goes on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from passl.config import ConfigError
from passl.engine import build
from tests.engine import runs_job, sharding_job, tiny
from tests.engine.test_distributed import launch

SHARDED = ("-o", "DistributedStrategy.sharding=true")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process of `sharding_job` found."""
    folder = tmp_path_factory.mktemp("sharding")
    done = launch(folder, sharding_job.__file__, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", sharding_job.KINDS)
def test_sharded_is_whole_bit_for_bit(results, kind):
    """Also with a layer that starts later, saved before and after, resumed with and without shares."""
    for found in results:
        shares = found[kind].pop("share")
        assert 0.4 < shares < 0.6
        assert [what for what, is_same in found[kind].items() if not is_same] == []
    assert results[0]["half"]


def test_inner_micro_batches_are_not_exchanged(results):
    """The first gradient is each process's own; the second is the mean of the sums: (1 + 10 + 2 + 11) / 2."""
    assert [found["gradients"] for found in results] == [[[1, 12], [1, 12]], [[2, 12], [2, 12]]]


def run_all(folder, processes, **runs):
    """Name of the folder and overrides of each run; all in one launch."""
    lines = []
    for name, options in runs.items():
        arguments = ["-c", folder / "pretrain.yaml", "-o", f"Global.output_dir={folder / name}"]
        arguments += ["-o", f"DataLoader.Train.sampler.batch_size={8 // processes}", "-o", "Global.save_interval=3it"]
        lines.append(json.dumps([*map(str, arguments), *options]))
    (folder / "runs.txt").write_text("\n".join(lines))
    if processes > 1:
        done = launch(folder, runs_job.__file__, folder / "runs.txt", processes=processes)
    else:
        done = tiny.run(Path(runs_job.__file__).read_text(), folder / "runs.txt")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_runs_go_on_with_other_shares_and_other_numbers_of_processes(tmp_path):
    """Of two processes to the last bit; between one and two to float32 rounding, as without shares."""
    tiny.write_images(tmp_path, train=8)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    same = tiny.overrides(Model__backbone__drop_path_rate=0)  # processes drop other samples
    three = [*same, *tiny.overrides(Global__max_train_step=3)]
    six = [*same, *tiny.overrides(Global__max_train_step=6)]
    half = tiny.overrides(Global__checkpoint=tmp_path / "half/DINO/latest")
    one_half = tiny.overrides(Global__checkpoint=tmp_path / "one_half/DINO/latest")
    accumulated = tiny.overrides(Global__accum_steps=2, Global__max_train_step=3)
    recompute = tiny.overrides(DistributedStrategy__recompute="true")
    run_all(tmp_path, 1, one=six, one_half=three)
    shown = run_all(
        tmp_path,
        2,
        whole=six,
        sharded=[*six, *SHARDED],
        half=[*three, *SHARDED],
        whole_end=[*six, *half],
        sharded_end=[*six, *half, *SHARDED],
        one_sharded=[*six, *one_half, *SHARDED],
        accumulated=accumulated,
        recomputed=[*accumulated, *recompute, *SHARDED],
    )
    run_all(tmp_path, 1, half_one=[*six, *half])
    for name in ("sharded", "whole_end", "sharded_end"):
        tiny.assert_same_checkpoint(tmp_path / "whole/DINO/latest", tmp_path / name / "DINO/latest")
    tiny.assert_same_checkpoint(tmp_path / "accumulated/DINO/latest", tmp_path / "recomputed/DINO/latest")
    tiny.assert_close_runs(tmp_path / "one/DINO", tmp_path / "sharded/DINO")
    expected = list(tiny.read_metrics(tmp_path / "one/DINO/metrics.jsonl"))[3:]
    for name in ("half_one", "one_sharded"):
        rows = list(tiny.read_metrics(tmp_path / name / "DINO/metrics.jsonl"))
        assert [row["step"] for row in rows] == [4, 5, 6]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=2e-5)
    assert "each of 2 processes keeps the optimizer state of" in shown


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data_parallel": False}, r"data_parallel \(false\) must be true"),
        ({"sharding": {"sharding_stage": 2}}, r"sharding.sharding_stage \(2\) must be 1: the optimizer's state is sha"),
        (
            {"sharding": {"sharding_degree": 0}},
            r"sharding.sharding_degree \(0\) must be the number of processes",
        ),
        (
            {"sharding": {"sharding_offload": True}},
            "sharding.sharding_offload .true.: the state stays where",
        ),
        ({"recompute": 1.5}, r"recompute \(1.5\) must be true, a number of blocks, or a share"),
        ({"recompute": {"layerlist_interval": 0}}, r"recompute.layerlist_interval \(0\) must be at least 1"),
        (
            {"recompute": {"names": ["mlp"]}},
            r"recompute.names \(\['mlp'\]\): whole blocks are recomputed, no other layers",
        ),
    ],
)
def test_what_is_not_done_is_refused(section, message):
    with pytest.raises(ConfigError, match=f"DistributedStrategy.{message}"):
        build.strategy({"DistributedStrategy": section})
