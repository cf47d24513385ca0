"""The picture of a run's curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.log import MetricsFile
from passl.visualize.curves import draw_run, plot_run


def write_run(folder: Path) -> Path:
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl", 0)
    for step in range(1, 9):
        file.write(step, {"phase": "train", "epoch": (step - 1) // 4 + 1, "loss": 9.0 - step})
        if step % 4 == 0:
            file.write(step, {"phase": "eval", "epoch": step // 4, "knn_top1_k20": 5.0 * step})
    return folder


def test_curves_and_baselines_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    plain = np.asarray(Image.open(plot_run(run, tmp_path / "plain.png", "knn_top1_k20")))
    compared = np.asarray(Image.open(plot_run(run, tmp_path / "sub/b.png", "knn_top1_k20", {"pixels": 11.0})))
    assert plain.shape == compared.shape
    left, right = np.split((plain != compared).any(axis=-1), 2, axis=1)
    assert not left.any()
    assert right.any(axis=0).mean() > 0.6  # the line crosses the right panel


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no accuracy to draw"):
        plot_run(write_run(tmp_path / "run"), tmp_path / "x.png", "accuracy")


def test_the_parts_of_a_loss_are_drawn_with_it() -> None:
    rows = [
        {"step": step, "epoch": 1, "phase": "train", "loss": 3.0, "dino_loss": 2.0, "koleo_loss": -1.0, "top1": 5.0}
        for step in (1, 2)
    ]
    axes = draw_run(rows).axes[0]
    assert [line.get_label() for line in axes.lines] == ["loss", "dino_loss", "koleo_loss"]
    assert [line.get_ydata()[0] for line in axes.lines] == [3.0, 2.0, -1.0]
