"""Files that runs leave behind, whole, cut and foreign."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from passl.doctor.reading import UnreadableRunError, read_run
from passl.doctor.verdict import diagnose

OFFICIAL = '{"train_loss": 9.5, "train_lr": 0.0003, "train_wd": 0.04, "epoch": 0}\n{"train_loss": NaN, "epoch": 1}\n'
TRAIN = [{"step": step, "phase": "train", "epoch": 1, "loss": 6.0, "lr": 0.1, "data_wait": 0.0} for step in (1, 2)]
VISIT = {"step": 2, "phase": "doctor", "out_dim": 64, "loss": 6.0, "teacher_entropy": 1.0, "teacher_mean_entropy": 2.0}
CONFIG = "Global: {epochs: 3}\nModel: {name: DINO, head: {name: DINOHead, out_dim: 128}}\n"


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.mark.smoke
def test_our_runs(tmp_path) -> None:
    file = write(tmp_path, "metrics.jsonl", [*TRAIN, {"step": 2, "phase": "eval", "knn_top1_k20": 5.0}, VISIT])
    (tmp_path / "config.yaml").write_text(CONFIG)
    for path in (tmp_path, file):
        run = read_run(path)
        assert [row["step"] for row in run.curve] == [1, 2]
        assert [row["step"] for row in run.visits] == [2]
        assert run.out_dim == 64, "what was measured, before the configuration"
        assert run.settings["Global.epochs"] == 3
        assert not run.has_labels
    assert read_run(tmp_path, out_dim=32).out_dim == 32
    write(tmp_path, "metrics.jsonl", TRAIN)
    assert read_run(tmp_path).out_dim == 128
    (tmp_path / "config.yaml").write_text("Model: {name: DINO, head: {name: DINOHead}}\n")
    assert read_run(tmp_path).out_dim == 65536
    (tmp_path / "config.yaml").write_text("Model: [")
    assert read_run(tmp_path).out_dim is None
    (tmp_path / "config.yaml").write_text("Model: {name: LinearProbe}\n")
    assert read_run(tmp_path).has_labels


def test_the_loss_of_dinov2_is_that_of_its_views(tmp_path) -> None:
    """ln(out_dim) says nothing about a sum of losses, unless that is not finite."""
    rows = [{**TRAIN[0], "loss": 9.0, "dino_loss": 6.0}, {**TRAIN[1], "loss": math.inf, "dino_loss": 6.0}]
    write(tmp_path, "metrics.jsonl", rows)
    (tmp_path / "config.yaml").write_text("Model: {name: DINOv2, head: {name: DINOHead, out_dim: 128}}\n")
    run = read_run(tmp_path)
    assert [row["loss"] for row in run.curve] == [6.0, math.inf]
    assert not run.has_labels
    assert run.out_dim == 128


def test_official_logs(tmp_path) -> None:
    file = tmp_path / "log.txt"
    file.write_text(OFFICIAL + '{"train_loss": 9.0, "train_lr": 0.1, "epoch": 1}\n\n{"train_loss": 8.0, "ep')
    for path in (tmp_path, file):
        run = read_run(path)
        assert [row["loss"] for row in run.curve] == [9.5, 9.0], "epoch 1 was trained again; the last line is cut"
        assert run.is_official
        assert run.is_by_epoch
    file.write_text('{"train_loss": 3.0}\n{"train_loss": 2.0}')
    assert [row["epoch"] for row in read_run(file).curve] == [0, 1]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path) -> None:
    """The run that resumes writes on behind it."""
    lines = ['{"train_loss": 3.0, "epoch": 0}', '{"train_lo{"train_loss": 2.0, "epoch": 1}', '{"train_loss": 1.0}']
    (tmp_path / "log.txt").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    run = read_run(tmp_path)
    assert [row["loss"] for row in run.curve] == [3.0, 1.0]
    assert run.left_out == [2]


def test_rows_with_other_things_than_numbers(tmp_path) -> None:
    """What no rule can read is left out, and a visit that lacks an entropy with it."""
    odd = ["x", None, [1], 10**400, math.inf]
    rows = [{**VISIT, "teacher_entropy": value} for value in odd] + [{**VISIT, "lr": value} for value in odd]
    rows += [{**VISIT, "out_dim": "many"}, {**VISIT, "step": math.nan}, {**TRAIN[0], "lr": 10**400}]
    run = read_run(write(tmp_path, "metrics.jsonl", rows))
    assert len(run.visits) == len(odd) + 1
    assert not any("lr" in row for row in [*run.visits, *run.curve])
    assert diagnose(run).verdict == "healthy"


def test_epochs_are_finite(tmp_path) -> None:
    (tmp_path / "log.txt").write_text('{"train_loss": 2.0, "epoch": NaN}\n{"train_loss": 1.0, "epoch": 1e999}\n')
    assert [row["epoch"] for row in read_run(tmp_path).curve] == [0, 1]


def test_recorded_official_logs(reference) -> None:
    for file in reference.glob("*_log.txt"):
        run = read_run(file)
        assert len(run.curve) == len(file.read_text().splitlines())
        assert run.has_labels == file.name.startswith("linear")


def test_logs_with_passls_lines(tmp_path) -> None:
    lines = [
        "[2026/11/21 15:51:44] passl: [Train][Epoch 1/20][Iter: 0/40] lr: 0.000742, loss: 5.54438, ips: 9.1 images/sec",
        "[2026/11/21 15:51:45] passl INFO: something else",
        "[2023/01/01 00:00:00] ppcls INFO: [Train][Epoch 2/20][Iter: 10/40]lr: 0.00074, loss: nan, reader_cost: 0.1 s",
    ]
    (tmp_path / "train.log").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert [row["step"] for row in run.curve] == [1, 51]
    assert run.curve[0]["loss"] == 5.54438
    assert run.curve[0]["lr"] == 0.000742
    assert run.curve[1]["loss"] != run.curve[1]["loss"]
    assert not run.has_labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not UTF-8 text"),
        (b"hello\nworld\n", "line 1 is no JSON object"),
        (b'{"train_loss": 1.0}\n{"train_l\n[1, 2]\n', "line 2 is no JSON object"),
        (b'{"train_loss": %s}\n' % (b"9" * 400), "no row has a loss"),
        (b'{"a": 1}\n', "no row has a loss"),
        (b'{"train_loss": "low"}\n', "no row has a loss"),
        (b'{"step": 1, "phase": "eval", "knn": 3.0}\n', "no row of the phases train or doctor has a loss"),
        (b"[" * 100000, "line 1 is no JSON object"),
        (b"[Train][Epoch 1/2][Iter: 0/4] lr: 0.1\n", "has a loss"),
    ],
)
def test_files_that_cannot_be_diagnosed(tmp_path, content, message) -> None:
    file = tmp_path / "log.txt"
    file.write_bytes(content)
    with pytest.raises(UnreadableRunError, match=message) as caught:
        read_run(file)
    assert str(file) in str(caught.value)


def test_missing_files_and_folders(tmp_path) -> None:
    with pytest.raises(UnreadableRunError, match="nothing: no such file or folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(UnreadableRunError, match="holds no metrics.jsonl, log.txt or train.log; expected"):
        read_run(tmp_path)
    (tmp_path / "DINO").mkdir()
    write(tmp_path / "DINO", "metrics.jsonl", TRAIN)
    with pytest.raises(UnreadableRunError, match=f"did you mean {tmp_path / 'DINO'}?"):
        read_run(tmp_path)
    if os.geteuid():
        (tmp_path / "DINO/metrics.jsonl").chmod(0)
        with pytest.raises(UnreadableRunError, match="Permission denied"):
            read_run(tmp_path / "DINO")
