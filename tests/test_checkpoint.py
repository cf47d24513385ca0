"""Files of weights: what is read, what is refused, what is lost (nothing)."""

from __future__ import annotations

import contextlib
import os
import pickle
import tracemalloc

import numpy as np
import paddle
import pytest
from paddle import nn

from passl import checkpoint
from passl.checkpoint import CheckpointError, CheckpointStore

pytestmark = pytest.mark.smoke


def test_weights_make_the_way_there_and_back(tmp_path):
    layer, other = nn.Linear(4, 3), nn.Linear(4, 3)
    checkpoint.write(layer.state_dict(), tmp_path / "w.pdparams")
    report = checkpoint.load_weights(other, checkpoint.read_weights(tmp_path / "w"), "w")
    assert str(report) == "2 of 2 keys matched"
    assert (other.weight.numpy() == layer.weight.numpy()).all()


def test_bfloat16_weights_keep_their_values(tmp_path):
    values = np.array([1.0, 2.0, -0.5], np.float32)
    paddle.save({"w": paddle.to_tensor(values).astype("bfloat16")}, str(tmp_path / "w.pdparams"))
    np.testing.assert_array_equal(checkpoint.read_weights(tmp_path / "w")["w"], values)


def test_all_misfits_are_listed_and_nothing_changes():
    layer = nn.Linear(4, 3)
    before = layer.bias.numpy().copy()
    with pytest.raises(CheckpointError) as found:
        checkpoint.load_weights(layer, {"weight": np.zeros((3, 4)), "bias": np.ones(3), "extra": np.ones(1)}, "file")
    for text in ("1 of 2 keys matched", "weight (file [3, 4], layer [4, 3])", "only in the file: extra"):
        assert text in str(found.value)
    assert (layer.bias.numpy() == before).all()


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps({"w": Harmful()}))
    with pytest.raises(CheckpointError, match=r"builtins\.print"):
        checkpoint.read_weights(tmp_path / "w")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no pickle", b"\x80\x04", b"hello"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "w.pdparams").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pdparams"):
        checkpoint.read_weights(tmp_path / "w")


def damaged(kind):
    """Files that make pickle or numpy fail in ways of their own."""
    if kind == "a count beyond all memory":  # OverflowError
        return b"\x80\x04\x8e" + b"\xff" * 8
    if kind == "too deep":  # RecursionError
        return b"\x80\x04" + b"(" + b"]" * 1 + b"\x8c\x01w" + b"]" * 5000 + b"a" * 4999 + b"\x86."
    if kind == "one list ten to the power of thirty times":
        nested: list = []
        for _ in range(30):
            nested = [nested] * 10
        return pickle.dumps({"w": nested}, protocol=4)
    content = pickle.dumps({"w": np.ones(3, np.float32)}, protocol=4)
    return content.replace(b"ndarray", b"dtype\x8c\x00", 1) if kind == "another class" else content[:-20] + b"."


DAMAGED = (
    "a count beyond all memory",
    "too deep",
    "one list ten to the power of thirty times",
    "another class",
    "a tail that is gone",
)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused(tmp_path, kind):
    (tmp_path / "w.pdparams").write_bytes(damaged(kind))
    with pytest.raises(CheckpointError, match=r"w\.pdparams"):
        checkpoint.read_weights(tmp_path / "w")


def test_numbers_in_a_file_allocate_nothing(tmp_path):
    """LONG_BINPUT: for pickle's own memory, a place far behind all others."""
    (tmp_path / "w.pdparams").write_bytes(b"\x80\x02}r\xff\xff\xff\x00.")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="no state dict"):
        checkpoint.read_weights(tmp_path / "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f4", "f8", "u1", ">i8", "?", "U3"])
def test_arrays_are_what_was_written(tmp_path, dtype, protocol):
    rows = np.arange(6).reshape(2, 3).astype(dtype)
    arrays = {
        "c": rows,
        "fortran": np.asfortranarray(rows),
        "empty": rows[:0],
        "number": rows[0, 0],
        "zero": rows[0, :1],
    }
    (tmp_path / "w.pdstates").write_bytes(pickle.dumps(arrays, protocol=protocol))
    for name, value in checkpoint.read(tmp_path / "w.pdstates").items():
        np.testing.assert_array_equal(value, arrays[name])
        assert value.dtype == arrays[name].dtype.newbyteorder("=")
        assert np.shape(value) == arrays[name].shape


def test_every_cut_and_many_changed_bytes_are_refused_or_read(tmp_path):
    """A damaged file gives weights or a CheckpointError, nothing else."""
    path = tmp_path / "w.pdparams"
    whole = pickle.dumps({"a": np.ones((2, 3), np.float32), "b": np.arange(3)}, protocol=4)
    rng = np.random.default_rng(0)
    variants = [whole[:length] for length in range(len(whole))]
    for _ in range(3000):
        bytes_ = bytearray(whole)
        bytes_[rng.integers(len(bytes_))] = rng.integers(256)
        variants.append(bytes(bytes_))
    for content in variants:
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            checkpoint.read_weights(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({0: np.ones(2)}, "the key 0 is no text"),
        ({"w": np.array([None, "x"], object)}, "arrays of object, not of numbers or text: refused"),
        ({"w": np.array(["x"])}, "'w' is no numbers, but <U1"),
        ({"w": [1.0]}, "'w' is no numbers, but list"),
        ([np.ones(2)], "holds no state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, state, message):
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps(state))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_weights(tmp_path / "w")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.with_suffix("~/run/latest.pdopt", ".pdparams") == tmp_path / "run/latest.pdparams"
    assert CheckpointStore("~/run").folder == tmp_path / "run"


def test_the_order_of_a_file_is_not_that_of_the_state(tmp_path):
    one, two = paddle.ones([1]), paddle.zeros([1])
    store = CheckpointStore(tmp_path)
    for name, order in (("epoch_1", (0, 1)), ("epoch_2", (1, 0))):
        entries = [("a", one), ("b", two)]
        state = dict([entries[number] for number in order])
        store.save(name, state, {"master_weights": state, **state}, {"step": 1})
        optimizer = checkpoint.read(tmp_path / "latest.pdopt")
        assert list(checkpoint.read(tmp_path / "latest.pdparams")) == ["a", "b"]
        assert (list(optimizer), list(optimizer["master_weights"])) == (["a", "b", "master_weights"], ["a", "b"])


@pytest.mark.parametrize("states", [["step"], np.ones(2), {"step": "1", "checksums": {}}, {"step": 9, "checksums": {}}])
def test_foreign_states_do_not_hide_a_whole_set(tmp_path, states):
    store = CheckpointStore(tmp_path, max_num_latest=-1)
    store.save("epoch_1", {"w": paddle.ones([1])}, {"m": paddle.ones([1])}, {"step": 1})
    (tmp_path / "foreign.pdstates").write_bytes(pickle.dumps(states))
    assert checkpoint.read_states(store.newest_intact())["step"] == 1
    assert store.set_aside(after_step=1) is None
    with pytest.raises(CheckpointError, match=r"foreign\.pdstates"):
        checkpoint.read_states(tmp_path / "foreign")


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "latest.pdparams").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"the folder has latest\.pdparams"):
        checkpoint.read_weights(tmp_path / "lates")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save("epoch_1", {"w": paddle.ones([2])}, {"m": paddle.ones([2])}, {"step": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paddle, "save", full)
    with pytest.raises(OSError, match="No space left"):
        store.save("epoch_2", {"w": paddle.zeros([2])}, {"m": paddle.ones([2])}, {"step": 2})
    assert checkpoint.read_states(store.newest_intact())["step"] == 1
    assert not list(tmp_path.glob("*.partial"))


def test_half_a_set_does_not_keep_the_room_of_the_next_one(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    save = paddle.save

    def full(value, path, **more):
        if ".pdopt" in path:
            raise OSError(28, "No space left on device")
        save(value, path, **more)

    monkeypatch.setattr(paddle, "save", full)
    with pytest.raises(OSError, match="No space left"):
        store.save("step_2", {"w": paddle.zeros([2])}, {"m": paddle.ones([2])}, {"step": 2})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_a_first_save_that_was_cut_off_is_nothing_to_lose(tmp_path, is_cut_off):
    (tmp_path / "step_2.pdparams").write_bytes(b"whole")
    (tmp_path / "step_2.pdopt.7.partial").write_bytes(b"half")
    store = CheckpointStore(tmp_path)
    if is_cut_off:
        assert store.newest_intact() is None
        return
    (tmp_path / "latest.pdparams").write_bytes(b"whole")  # some save came to its end
    with pytest.raises(CheckpointError, match="no checkpoint in it is whole"):
        store.newest_intact()


@pytest.mark.parametrize(("keep", "expected"), [(0, []), (2, [4, 5]), (-1, [1, 2, 3, 4, 5])])
def test_as_many_epochs_stay_as_asked(tmp_path, keep, expected):
    store = CheckpointStore(tmp_path, keep)
    for epoch in range(1, 6):
        store.save(f"epoch_{epoch}", {"w": paddle.ones([1])}, {"m": paddle.ones([1])}, {"step": epoch}, best=epoch == 2)
    names = {path.stem for path in tmp_path.glob("*.pdparams")}
    assert names == {"latest", "previous", "best", *(f"epoch_{epoch}" for epoch in expected)}
    assert checkpoint.read_states(tmp_path / "best")["step"] == 2
    assert checkpoint.read_states(tmp_path / "latest")["step"] == 5


@pytest.mark.smoke
@pytest.mark.parametrize("is_torn", [False, True])
@pytest.mark.parametrize("number", range(1, 19))
def test_power_loss_at_any_moment_of_saving(tmp_path, monkeypatch, caplog, number, is_torn):
    """Before the n-th rename (three files, three links each of previous and latest, of two saves): what is found is
    whole, and the newest. Torn: the last file came to the disk without its content.
    """
    states = {"epoch": 0}
    store = CheckpointStore(tmp_path)
    weights = [{"w": paddle.full([50], float(step))} for step in range(3)]
    store.save("step_0", weights[0], {"m": weights[0]["w"]}, {**states, "step": 0}, best=True)
    done = []
    replace = os.replace

    def rename(source, target):
        if len(done) == number - 1:
            if is_torn and done:
                os.truncate(done[-1], 10)
            raise KeyboardInterrupt  # no error that anything would catch
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)
    with contextlib.suppress(KeyboardInterrupt):
        for step in (1, 2):
            store.save(f"step_{step}", weights[step], {"m": weights[step]["w"]}, {**states, "step": step})
    found = store.newest_intact()
    step = checkpoint.read_states(found)["step"]
    whole = (number - 1 >= 3) + (number - 1 >= 12)
    assert step == whole if not is_torn else whole - 1 <= step <= whole
    np.testing.assert_array_equal(checkpoint.read_weights(found)["w"], weights[step]["w"].numpy())
    assert (f"going on from {found}" in caplog.text) == (found.name != "latest")
