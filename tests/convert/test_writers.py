"""What the three writers share: atomic, frugal, exact about what they refuse."""

from __future__ import annotations

import errno
import os
import resource
import tracemalloc

import numpy as np
import pytest

from passl.convert import load_safetensors, load_torch, save_pdparams, save_safetensors, save_torch
from tests.convert.contents import arrays_of_all_kinds

pytestmark = pytest.mark.smoke

WRITERS = (save_torch, save_safetensors, save_pdparams)
FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__)
def save(request):
    return request.param


def test_equal_values_give_equal_files(save, tmp_path):
    arrays = arrays_of_all_kinds()
    save(arrays, tmp_path / "a")
    save({name: np.array(array, order="F") for name, array in arrays.items()}, str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_big_endian_numbers_are_turned(save, tmp_path):
    save({"a": FLOATS}, tmp_path / "little")
    save({"a": FLOATS.astype(">f4")}, tmp_path / "big")
    assert (tmp_path / "little").read_bytes() == (tmp_path / "big").read_bytes()


def test_after_an_error_the_old_file_is_there_and_no_other(save, tmp_path):
    save({"a": FLOATS}, tmp_path / "w")
    before = (tmp_path / "w").read_bytes()
    with pytest.raises(ValueError, match="'b'"):
        save({"a": FLOATS + 1, "b": np.array(["text"])}, tmp_path / "w")
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert (tmp_path / "w").read_bytes() == before


def test_a_file_that_does_not_fit_leaves_nothing(save, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large\): .*/w"):
            save({"a": FLOATS, "b": np.zeros(1 << 20, np.uint8)}, tmp_path / "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_file_is_on_the_disk_before_it_has_its_name(save, tmp_path, monkeypatch):
    def full(_: int) -> None:
        assert not (tmp_path / "w").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save({"a": FLOATS}, tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_arrays_are_in_memory_one_at_a_time(save, tmp_path):
    """Those that have to be turned first, as transposed ones."""
    size = 4 << 20
    state = {f"w{i}": np.full((1 << 10, size >> 10), i, np.uint8).T for i in range(8)}
    tracemalloc.start()
    save(state, tmp_path / "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * size


def test_a_mapped_file_can_be_replaced_by_what_is_read_from_it(tmp_path):
    for save, load, name in (
        (save_torch, load_torch, "w.pth"),
        (save_safetensors, load_safetensors, "w.safetensors"),
    ):
        save({"a": FLOATS}, tmp_path / name)
        found = load(tmp_path / name)
        save({"b": found["a"].T}, tmp_path / name)
        np.testing.assert_array_equal(load(tmp_path / name)["b"], FLOATS.T)
        np.testing.assert_array_equal(found["a"], FLOATS)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros(2, "V4"), np.zeros(2, "M8[s]")])
def test_arrays_of_no_numbers_are_refused(save, tmp_path, array):
    with pytest.raises(ValueError, match=r"'a'.* has numbers of type .*, must be one of .*float32"):
        save({"a": array}, tmp_path / "w")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("load", [load_torch, load_safetensors])
def test_the_option_bfloat16_has_two_values(load, tmp_path):
    with pytest.raises(ValueError, match=r"bfloat16 \('uint16'\) must be 'float32' .* or 'bits'"):
        load(tmp_path / "w.safetensors", bfloat16="uint16")
