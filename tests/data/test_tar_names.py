"""The pickled dict of a tarball's names: recorded ones, every protocol of pickle, and pickles that are none of it."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from passl.data.tar_names import NamesBuilder, read_names, read_rows, write_names, write_rows
from passl.formats.limits import CheckpointFormatError, RefusedGlobalError


def save(path: Path, value: object, protocol: int = 4, shape: tuple[int, ...] = ()) -> Path:
    array = value if isinstance(value, np.ndarray) else np.array(value, object)
    return save_pickle(path, pickle.dumps(array, protocol), shape)


def save_pickle(path: Path, data: bytes, shape: tuple[int, ...] = ()) -> Path:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
        file.write(data)
    return path


@pytest.mark.smoke
def test_recorded_names_and_classes(reference, tmp_path):
    recorded = sorted((reference / "tarball").rglob("*indices.npy"))
    assert recorded
    for path in recorded:
        expected = np.load(path, allow_pickle=True).item()
        names = read_names(path)
        assert {int(number): names[number] for number in names.all_numbers()} == expected
        with (tmp_path / "again.npy").open("wb") as file:
            write_names(file, names)
        assert np.load(tmp_path / "again.npy", allow_pickle=True).item() == expected
    for path in (reference / "tarball").rglob("class-ids.npy"):
        expected = np.load(path, allow_pickle=True).tolist()
        assert read_rows(path) == [tuple(row) for row in expected]
        with (tmp_path / "rows.npy").open("wb") as file:
            write_rows(file, read_rows(path))
        assert np.load(tmp_path / "rows.npy", allow_pickle=True).tolist() == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 1000, 1001, 70_000])
def test_dicts_of_any_protocol(tmp_path, protocol, count):
    # Every third name occurs before: pickle then refers to it, as in the clemsgrs code's files (pathlib interns names).
    names = {i + 1: sys.intern(f"n{i - 1 if i % 3 == 2 else i}é\udcff.jpg") for i in range(count)}
    if count == 2:
        names[1 << 40] = "far"
    read = read_names(save(tmp_path / "x.npy", names, protocol))
    assert {int(number): read[number] for number in read.all_numbers()} == names
    for missing in (0, count + 1 if count != 2 else 7, 1 << 50):
        with pytest.raises(KeyError):
            read[missing]


def test_numbers_need_no_order_and_equality_is_of_content():
    builders = [NamesBuilder(), NamesBuilder(), NamesBuilder()]
    for builder, numbers in zip(builders, ([0, 1, 2], [0, 1, 2], [7, 1, 3])):
        for number in numbers:
            builder.add(number, b"%d" % number)
    first, same, other = (builder.build() for builder in builders)
    assert first == same
    assert first != other
    assert [other[number] for number in (1, 3, 7)] == ["1", "3", "7"]


class Hostile:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.smoke
def test_hostile_pickles_are_refused_by_name(tmp_path):
    mark = tmp_path / "executed"
    for function, name in ((os.system, "system"), (eval, "eval"), (open, "open"), (np.memmap, "memmap")):
        for value in ({0: Hostile(function, f"touch {mark}")}, Hostile(function, f"touch {mark}")):
            message = rf"x.npy: the file asks for [\w.]*{name}, which is no part of an index of a tarball: refused"
            for protocol in (2, 4):
                with pytest.raises(RefusedGlobalError, match=message):
                    read_names(save(tmp_path / "x.npy", value, protocol))
                with pytest.raises(RefusedGlobalError, match=message):
                    read_rows(save(tmp_path / "x.npy", [[0, value]], protocol, (1, 2)))
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        {0: 1},
        {"a": "b"},
        {-1: "a"},
        {0: None},
        {0: ["a"]},
        {0: {1: "a"}},
        {0: b"a"},
        {1 << 70: "a"},
        ["a"],
        "a",
        None,
        [{0: "a"}, {0: "a"}],
        collections.OrderedDict({0: "a"}),
        np.arange(3),
    ],
)
def test_anything_but_numbers_and_names_is_refused(tmp_path, value):
    array = value if isinstance(value, np.ndarray) else np.empty((), object)
    if array is not value:
        array[()] = value
    with pytest.raises(CheckpointFormatError, match="x.npy"):
        read_names(save(tmp_path / "x.npy", array))


def test_damage_is_an_error_with_the_file_s_name(tmp_path):
    whole = save(tmp_path / "x.npy", {i: f"{i}.jpg" for i in range(1500)}).read_bytes()
    for size in (0, 5, 60, 128, 140, 300, 2000, len(whole) - 1):
        (tmp_path / "cut.npy").write_bytes(whole[:size])
        with pytest.raises(CheckpointFormatError, match="cut.npy"):
            read_names(tmp_path / "cut.npy")
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole[:400] + whole[-60:])
        damaged[rng.integers(128, len(damaged))] = rng.integers(256)
        (tmp_path / "bad.npy").write_bytes(damaged)
        with contextlib.suppress(CheckpointFormatError):
            read_names(tmp_path / "bad.npy")


def test_names_that_are_no_utf_8_are_damage(tmp_path):
    whole = save(tmp_path / "x.npy", {0: "first.jpg", 1: "second.jpg"}).read_bytes()
    (tmp_path / "x.npy").write_bytes(whole.replace(b"second", b"sec\xffnd"))
    with pytest.raises(CheckpointFormatError, match="x.npy: damaged"):
        read_names(tmp_path / "x.npy")


def test_a_few_bytes_that_repeat_a_long_name_are_refused(tmp_path):
    name = "n" * 1_000_000
    bomb = save(tmp_path / "x.npy", dict.fromkeys(range(900), name), protocol=3)
    assert bomb.stat().st_size < 1_100_000
    with pytest.raises(CheckpointFormatError, match="x.npy: its content needs .* bytes of memory, more than the"):
        read_names(bomb)


def test_rows_must_be_labels_and_names(tmp_path):
    for value, shape in (([["a", 0]], (1, 2)), ([0, "a", 1], (3,)), ({0: "a"}, ()), ([[True, "a"]], (1, 2))):
        with pytest.raises(CheckpointFormatError, match="holds no rows of a label"):
            read_rows(save(tmp_path / "x.npy", value, 4, shape))
