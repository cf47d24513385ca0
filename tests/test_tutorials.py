"""The tutorials' own commands, read from their pages and run at a small size."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from passl.config import load
from passl.engine.run import checked
from tests.engine import tiny

TUTORIALS = tiny.ROOT / "tutorials"
PROGRAMS = {"passl-train": tiny.TRAIN, "passl-eval": tiny.EVAL}
SMALLER = {
    "draw_regions.py": ["--train", "5", "--val", "2"],
    "passl-train": tiny.overrides(Global__epochs="1", Schedules__lr__warmup="1it", Global__use_visualdl="false"),
}


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def run(words: list[str], folder: Path) -> str:
    smaller = [word for name, more in SMALLER.items() if any(w.endswith(name) for w in words[:2]) for word in more]
    program, arguments = words[0], [*words[1:], *smaller]
    if program in PROGRAMS:
        done = tiny.run(PROGRAMS[program], *arguments, cwd=folder)
    else:
        assert program == "python"
        code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        done = tiny.run(code, *arguments, cwd=folder)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("path", sorted(TUTORIALS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configurations(path):
    checked(load(path), training="Optimizer" in load(path))


@pytest.mark.slow
def test_from_images_to_embeddings_of_regions(tmp_path):
    for name in ("tutorials", "configs"):
        shutil.copytree(tiny.ROOT / name, tmp_path / name)
    printed = [run(words, tmp_path) for words in commands(TUTORIALS / "hierarchical/README.md")]
    out = tmp_path / "output/hierarchical"
    features = sorted((out / "regions/VisionTransformer/features").rglob("*.npy"))
    assert len(features) == 28
    assert np.load(features[0]).shape == (256, 64)
    for name, width in (("mean", 64), ("untrained", 48), ("trained", 48)):
        assert np.load(out / f"embeddings/{name}/val.npy").shape == (8, width)
        assert "knn_top1_k5" in json.loads((out / f"embeddings/{name}/eval.json").read_text())
    assert "10000 regions of 4096 px" in printed[-1]


def test_the_page_shows_what_the_costs_are():
    page = (TUTORIALS / "hierarchical/README.md").read_text(encoding="utf-8")
    sys.path.insert(0, str(TUTORIALS / "hierarchical"))
    try:
        import cost
    finally:
        sys.path.pop(0)
    assert cost.report(10_000, 60.0) in page
    assert cost.vit_flops(197, 384, 12, 768) == pytest.approx(9.2e9, rel=0.01)  # ViT-S/16 has 4.6 GMAC
