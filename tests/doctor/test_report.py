"""The picture and the page of a diagnosed run."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.doctor.finding import Finding
from passl.doctor.report import write_report
from passl.doctor.runs import Run

CURVE = [{"step": step, "epoch": 1, "loss": 8.0 - step / 50, "lr": 1e-3} for step in range(1, 100)]
VISITS = [
    {
        "step": step,
        "out_dim": 64,
        "loss": 4.1,
        "teacher_entropy": 4.0,
        "teacher_mean_entropy": 4.1,
        "gradient_norm": 0.0,
    }
    for step in (1, 50, 100)
]


@pytest.mark.parametrize("visits", [[], VISITS])
@pytest.mark.parametrize("verdict", ["healthy", "uniform collapse"])
def test_picture_and_page(tmp_path: Path, visits, verdict) -> None:
    run = Run(visits=list(visits), curve=[*CURVE, {"step": 101, "loss": math.nan}], out_dim=64)
    finding = Finding(verdict, ("loss < ln K & more",), ("Model.x: y",) if verdict != "healthy" else ())
    picture, page = write_report(run, finding, "a $run$ <b>", tmp_path / "new/folder")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.std() > 10
    text = page.read_text(encoding="utf-8")
    assert verdict in text
    assert "loss &lt; ln K &amp; more" in text
    assert "a $run$ &lt;b&gt;" in text
    assert ("What to change" in text) == (verdict != "healthy")
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(embedded) == picture.read_bytes()
    assert not re.search(r"https?://|<script|<link|url\(", text), "the page needs nothing else"


def test_numbers_beyond_any_axis_leave_a_gap(tmp_path: Path) -> None:
    run = Run(curve=[{"step": step, "loss": loss} for step, loss in enumerate([9.0, 1e308, -1e308, math.inf, 9.0])])
    assert write_report(run, Finding("unstable"), "run", tmp_path)[0].is_file()


def test_empty_panels_are_left_out(tmp_path: Path) -> None:
    run = Run(curve=[{"epoch": 0, "loss": 3.0}], is_by_epoch=True)
    picture, page = write_report(run, Finding("healthy"), "log.txt", tmp_path)
    alone = Image.open(picture).width
    run.curve[0]["lr"] = 0.1
    assert Image.open(write_report(run, Finding("healthy"), "log.txt", tmp_path)[0]).width > alone
    assert "weight decay" not in page.read_text()
