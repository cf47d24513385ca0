"""The protocols as commands: from a YAML file, in one process and in two."""

import csv
import json

import pytest

from tests.engine import tiny
from tests.engine.test_distributed import launch
from tests.evaluators import made_sets

CONFIG = """
Global: {{output_dir: {folder}/out, device: cpu}}
Model: {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 12, depth: 2, num_heads: 2, init_std: 0.3}}
Evaluators:
  - {{name: ImageRetrieval, root: {folder}/ImageRetrieval, multiscale: true}}
  - {{name: CopyDetection, root: {folder}/CopyDetection, image_size: 32, whitening: {folder}/CopyDetection/original}}
  - {{name: VideoSegmentation, root: {folder}/VideoSegmentation, image_size: 64, folder: davis}}
"""


def test_two_processes_measure_what_one_does(tmp_path):
    made_sets.write_all(tmp_path)
    config = tiny.write_config(tmp_path, CONFIG, "config.yaml")
    one = tiny.run(tiny.EVAL, "-c", config, *tiny.overrides(Global__output_dir=tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = launch(tmp_path, tiny.ROOT / "tools/eval.py", "-c", config)
    assert two.returncode == 0, two.stdout + two.stderr
    folders = [tmp_path / name / "VisionTransformer" for name in ("one", "out")]
    ours, theirs = (json.loads((folder / "eval.json").read_text()) for folder in folders)
    assert ours == pytest.approx(theirs, abs=0.01)
    assert {"mAP_medium", "mP@10_hard", "copydays_mAP_strong", "J&F-Mean"} <= set(ours)
    masks = [sorted(path.relative_to(folder) for path in folder.rglob("*.png")) for folder in folders]
    assert len(masks[0]) == 12
    assert masks[0] == masks[1]
    with (folders[0] / "davis/global_results-val.csv").open() as file:
        assert next(csv.DictReader(file))["J&F-Mean"] == f"{ours['J&F-Mean'] / 100:.3f}"


def test_what_is_missing_is_said_at_the_start(tmp_path):
    made_sets.write_all(tmp_path)
    config = tiny.write_config(tmp_path, CONFIG, "config.yaml")
    arguments = tiny.overrides(Evaluators__0__root=tmp_path / "none")
    done = tiny.run(tiny.EVAL, "-c", config, *arguments)
    assert done.returncode == 2, done.stderr
    assert "gnd_roxford5k.pkl: root must hold" in done.stderr
    assert "Traceback" not in done.stderr
    assert tiny.run(tiny.EVAL, "-c", config, *arguments, "--check").returncode == 0
    misspelt = tiny.run(tiny.EVAL, "-c", config, *tiny.overrides(Evaluators__2__top_k=3))
    assert misspelt.returncode == 2
    assert "topk" in misspelt.stderr
