"""The tutorial's code blocks, one after the other, and the names that the pages of the docs use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from passl.wrapper.conf import NAMES

ROOT = Path(__file__).parents[2]


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "tutorials/wrap_your_model/README.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out
    before, after = (float(number) for number in re.findall(r"k-NN \w+: ([\d.]+)%", printed))
    assert after > before
    assert "teacher_entropy" in printed
    assert (tmp_path / "backbone.pdparams").exists()


@pytest.mark.smoke
def test_the_docs_explain_every_setting():
    page = (ROOT / "docs/wrapper.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert explained >= set(NAMES) - {"version"}
