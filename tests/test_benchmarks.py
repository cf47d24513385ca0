"""The benchmarks run; what they measure is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("images", [[], ["--images", str(Path(__file__).parent / "reference" / "aug_images")]])
def test_multi_crop(images: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / "multi_crop.py"), "--number", "2", "--repeats", "1", *images]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = output.splitlines()
    assert lines[0] == "2 images, 1 passes of each side, one thread"
    rows = {line[:22].strip() for line in lines}
    assert {"all", "decode", "draw", "crop", "colour", "blur", "pack"} <= rows
    assert "official" in output  # measured, or said to be absent


def test_batch_views() -> None:
    command = [sys.executable, str(BENCHMARKS / "batch_views.py"), "--batch-size", "2", "--repeats", "1"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "CIFAR, 2 x 32 + 6 x 16" in output
    assert "times as fast" in output


def test_label_propagation() -> None:
    command = [
        sys.executable,
        str(BENCHMARKS / "label_propagation.py"),
        "--grid",
        "4x6",
        "--width",
        "8",
        "--repeats",
        "1",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "4x6 patches of width 8" in output
    assert "official" in output  # measured, or said to be absent


def test_knn() -> None:
    command = [sys.executable, str(BENCHMARKS / "knn.py"), "--rows", "500", "--repeats", "1", "--sets", "small", "base"]
    output = subprocess.run([*command, "--threads", "1"], check=True, capture_output=True, text=True).stdout
    lines = output.splitlines()
    assert lines[0] == "1 threads, 1 passes of each side; ms for a test image"
    assert [line.split()[:2] for line in lines[2:]] == [["small", "500"], ["base", "500"]]


def test_crops() -> None:
    command = [sys.executable, str(BENCHMARKS / "crops.py"), "--models", "demo", "--batch-size", "1", "--repeats", "1"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    products = {line[2:44].strip(): int(line[44:50]) for line in output.splitlines() if line.startswith("  ")}
    assert products["[CLS], each view by itself"] > products["[CLS], by size"]
    assert products["all tokens, by size"] > products["all tokens, packed"]
    assert "rate 0.4, on subsets" in products
