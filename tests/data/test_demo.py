"""The drawn data set: layout, determinism, what it refuses, and that pixels alone do not solve it."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from passl.data.datasets import ImageFolder
from passl.data.demo import SHAPES, DemoSettings, draw_picture, make_demo

SMALL = {"num_train_per_class": 3, "num_val_per_class": 2, "size": 24}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))}


@pytest.mark.smoke
def test_layout(tmp_path: Path) -> None:
    progress = []
    drawn = make_demo(tmp_path / "demo", **SMALL, progress=lambda done, total: progress.append((done, total)))
    assert drawn == 50
    assert progress == [(i + 1, 50) for i in range(50)]
    train, val = ImageFolder(tmp_path / "demo" / "train"), ImageFolder(tmp_path / "demo" / "val")
    assert (len(train), len(val)) == (30, 20)
    assert train.class_names == val.class_names == sorted(SHAPES)
    assert all(train.load(i).size == (24, 24) for i in range(len(train)))


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        make_demo(tmp_path / name, **SMALL, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert not set(first.values()) & set(other.values())
    assert len(set(first.values())) == len(first), "every picture is a different one"


def test_a_complete_set_is_left_alone_and_an_interrupted_one_completed(tmp_path: Path) -> None:
    class InterruptionError(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done == 7:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        make_demo(tmp_path, **SMALL, progress=interrupt)
    assert not json.loads((tmp_path / "demo.json").read_text())["complete"]
    assert make_demo(tmp_path, **SMALL) == 50
    before = contents(tmp_path)
    assert make_demo(tmp_path, **SMALL) == 0
    assert contents(tmp_path) == before


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    make_demo(tmp_path / "demo", **SMALL)
    with pytest.raises(FileExistsError, match=r"other settings \(seed is 0, not 5\)"):
        make_demo(tmp_path / "demo", **SMALL, seed=5)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="not empty and not a demo data set"):
        make_demo(foreign, **SMALL)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments",
    [{"size": 4}, {"num_val_per_class": 0}, {"min_size": 0.9, "max_size": 0.5}, {"clutter": 2.0}, {"rotation": 200}],
)
def test_bad_arguments_are_errors(tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_demo(tmp_path / "demo", **{**SMALL, **arguments})
    assert not (tmp_path / "demo").exists()


def test_pixels_alone_say_little_about_the_class() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(make_demo).parameters.items()}
    settings = DemoSettings(**{field.name: defaults[field.name] for field in dataclasses.fields(DemoSettings)})

    def pictures(split: int, count: int) -> np.ndarray:
        rows = [
            np.asarray(draw_picture(shape, settings, np.random.default_rng([split, label, number])), np.float32)
            for label, shape in enumerate(SHAPES)
            for number in range(count)
        ]
        rows = np.stack(rows).reshape(len(rows), -1)
        return rows - rows.mean(axis=1, keepdims=True)

    train, val = pictures(0, 60), pictures(1, 20)
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    nearest = (val @ train.T).argmax(axis=1) // 60
    accuracy = (nearest == np.arange(len(val)) // 20).mean()
    assert accuracy < 0.3
