"""Files that are damaged or made to harm: each ends in the clear error, nothing in them runs, nothing blows up."""

from __future__ import annotations

import argparse
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from passl.convert import CheckpointFormatError, load_torch
from passl.formats import pickle_machine
from tests.convert.test_torch_files import FLOATS, load_and_measure
from tests.convert.writer import Call, Named, Raw, Storage, pickled, tensor, view, write_legacy, write_zip

pytestmark = pytest.mark.smoke

STORAGE = Storage("FloatStorage", "0", 12, FLOATS.tobytes())


def write_bare(path: Path, value: Any) -> Path:
    """A pickle without any format of PyTorch around it."""
    path.write_bytes(pickled(value))
    return path


WRITERS = {"zip": write_zip, "legacy": write_legacy}


@pytest.fixture(params=sorted(WRITERS))
def write(request):
    return WRITERS[request.param]


def refused(path: Path, message: str) -> None:
    """The file ends in the error with `message`, soon and without much memory."""
    started = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(CheckpointFormatError, match=message) as found:
        load_torch(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (100 << 20) + 30 * path.stat().st_size
    assert time.perf_counter() - started < 60
    assert str(found.value).startswith(str(path))
    assert len(str(found.value)) < 1000


# --- code ---


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(trace: str) -> dict[str, tuple[Any, str]]:
    """Name -> what to write, and the global that has to be named."""
    command, code = f"touch {trace}", f"open({trace!r}, 'w')"
    system, evaluate, getattr_ = Named("os", "system"), Named("builtins", "eval"), Named("builtins", "getattr")
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    module = Call(Named("importlib", "import_module"), ("os",))
    return {
        "os.system": (Call(system, (command,)), r"os\.system"),
        "posix.system": (Call(Named("posix", "system"), (command,)), r"posix\.system"),
        "eval": (Call(evaluate, (code,)), r"builtins\.eval"),
        "exec of Python 2": (Call(Named("__builtin__", "exec"), (code,)), r"__builtin__\.exec"),
        "open": (Call(Named("builtins", "open"), (trace, "w")), r"builtins\.open"),
        "subprocess": (Call(Named("subprocess", "Popen"), (["touch", trace],)), r"subprocess\.Popen"),
        "chain": (Call(Call(getattr_, (module, "system")), (command,)), r"builtins\.getattr"),
        "nested": ({"w": tensor(FLOATS), "args": argparse.Namespace(a=[(Call(system, (command,)),)])}, r"os\.system"),
        "as the strides": (view(STORAGE, 0, (3, 4), Call(system, (command,))), r"os\.system"),
        "as a storage": (view(Call(system, (command,)), 0, (3, 4), (4, 1)), r"os\.system"),
        "as the hooks": (Call(rebuild, (STORAGE, 0, (1,), (1,), False, Call(system, (command,)))), r"os\.system"),
        "numpy's loader": (Call(Named("numpy", "load"), (trace,)), r"numpy\.load"),
        "torch.load": (Call(Named("torch.serialization", "load"), (trace,)), r"torch\.serialization\.load"),
        "a name with dots": (Call(Named("argparse", "Namespace.__init__"), ()), r"argparse\.Namespace\.__init__"),
        "a module of the model": (Call(Named("torch.nn.modules.linear", "Linear"), ()), r"linear\.Linear.*state_dict"),
        "INST": (Raw(b"(S'" + command.encode() + b"'\nios\nsystem\n"), r"os\.system"),
        "OBJ": (Raw(b"(cos\nsystem\nS'" + command.encode() + b"'\no"), r"os\.system"),
        "STACK_GLOBAL": (Raw(b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R"), r"os\.system"),
        "extension": (Raw(b"\x82\x01"), r"operation b'\\x82'"),
    }  # fmt: skip


@pytest.mark.parametrize("container", ["bare", "legacy", "zip"])
@pytest.mark.parametrize("name", list(attacks("")))
def test_code_is_refused_by_name_and_does_not_run(tmp_path, name, container):
    trace = tmp_path / "trace"
    content, message = attacks(str(trace))[name]
    path = {"bare": write_bare, **WRITERS}[container](tmp_path / "w.pth", content)
    if container == "bare" and "as " not in name and name != "nested":
        message = f"{message}|not a file of PyTorch"
    elif container == "bare":
        message = "os.system|refers to other data"
    refused(path, message)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reduce_does_not_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    content = pickle.dumps({"w": Reduced(exec, f"open({str(trace)!r}, 'w')")}, protocol)
    (tmp_path / "w.pth").write_bytes(content)
    refused(tmp_path / "w.pth", r"exec|not a file of PyTorch")
    refused(write_zip(tmp_path / "z.pth", Raw(content[2:-1] if protocol > 1 else content[:-1])), r"exec|truncated")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("_rebuild_sparse_tensor", "a sparse tensor .torch._utils._rebuild_sparse_tensor"),
        ("_rebuild_qtensor", "a quantised tensor"),
        ("_rebuild_wrapper_subclass", "torch._utils._rebuild_wrapper_subclass"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, write, name, what):
    refused(write(tmp_path / "w.pth", Call(Named("torch._utils", name), (1, 2))), what)


@pytest.mark.parametrize("name", ["conj", "neg"])
def test_tensors_to_be_conjugated_are_refused(tmp_path, write, name):
    plain = view(STORAGE, 0, (3, 4), (4, 1))
    content = Call(plain.function, (*plain.arguments, {name: True}))
    refused(write(tmp_path / "w.pth", content), rf"save tensor\.resolve_{name}\(\)")


@pytest.mark.parametrize(
    "content",
    [
        Named("torch._utils", "_rebuild_tensor_v2"),
        {"a": [Named("collections", "OrderedDict")]},
        argparse.Namespace(a=Named("torch", "FloatStorage")),
        [STORAGE],
    ],
)
def test_what_is_no_data_is_refused(tmp_path, write, content):
    refused(write(tmp_path / "w.pth", content), "the file holds .* itself, where data are expected")


@pytest.mark.parametrize(
    "operations",
    [
        b"cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb",  # attributes of the class
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x05\x00\x00\x00buildK\x01sb",
        b"cargparse\nNamespace\n)\x81}X\x09\x00\x00\x00__class__K\x01sb",
        b"cargparse\nNamespace\n)\x81}X\x0b\x00\x00\x00_get_kwargsK\x01sb",
        b"]}X\x01\x00\x00\x00aK\x01sb",
        b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R(K\x03X\x01\x00\x00\x00<NNNK\x01K\x01K\x00tb",
        b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R",
        b"cnumpy\ndtype\nX\x06\x00\x00\x00f8,O,O\x85R",
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",
        b"K\x01K\x02\x85R",
        b"(K\x01K\x02",
        b"0",
        b"h\x07",
        b"a",
        b"\x85",
        b"K\x01Q",
        b"(dN(lsK\x01)sa",
    ],
)
def test_nonsense_is_refused(tmp_path, write, operations):
    refused(write(tmp_path / "w.pth", Raw(operations)), "w.pth")


# --- sizes ---


@pytest.mark.parametrize(
    "content",
    [
        view(STORAGE, 0, (3, 5), (5, 1)),
        view(STORAGE, 1, (3, 4), (4, 1)),
        view(STORAGE, -1, (3, 4), (4, 1)),
        view(STORAGE, 0, (3, 4), (4, -1)),
        view(STORAGE, 11, (3, 4), (4, -1)),
        view(STORAGE, 0, (-3, 4), (4, 1)),
        view(STORAGE, 0, (2**40,), (0,)),
        view(STORAGE, 0, (2**61, 2**61), (0, 0)),
        view(STORAGE, 0, (2**70,), (0,)),
        view(STORAGE, 0, (2**62, 2**62, 0), (1, 1, 1)),
        view(STORAGE, 0, (2, 2), (2**61, 2**61)),
        view(STORAGE, 0, (1,) * 100, (1,) * 100),
        view(STORAGE, 0, (3, 4), (4,)),
        view(STORAGE, 0, (True, 4), (4, 1)),
        view(STORAGE, 0, (3.0, 4), (4, 1)),
        view(STORAGE, "0", (3, 4), (4, 1)),
        view("0", 0, (3, 4), (4, 1)),
        view(STORAGE, 0, 12, 1),
        view(Storage("FloatStorage", "0", 2**60, FLOATS.tobytes()), 0, (3, 4), (4, 1)),
        view(Storage("FloatStorage", "0", -12, FLOATS.tobytes()), 0, (3, 4), (4, 1)),
        view(Storage("FloatStorage", "0", 12, None), 0, (3, 4), (4, 1)),
        view(Storage("FloatStorage", "0", 12, FLOATS.tobytes()[:-1]), 0, (3, 4), (4, 1)),
        view(Storage("BoolStorage", "0", 3, b"\x00\x01\x02"), 0, (3,), (1,)),
        view(Storage("QInt8Storage", "0", 3, b"\x00\x01\x02"), 0, (3,), (1,)),
        Call(Named("numpy.core.multiarray", "scalar"), (Call(Named("numpy", "dtype"), ("f8", False, True)), b"1234")),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, write, content):
    refused(write(tmp_path / "w.pth", content), "w.pth")


def test_many_copies_of_few_numbers_are_refused(tmp_path, write):
    storage = Storage("FloatStorage", "0", 1 << 20, bytes(4 << 20))
    views = [view(storage, shift, (2, (1 << 19) - 50), (1, 2)) for shift in range(100)]
    refused(write(tmp_path / "w.pth", views), "more than the .* that are plausible")


@pytest.mark.parametrize(
    "use",
    [
        b"cargparse\nNamespace\n)\x81h\x01b",  # attributes
        b"ccollections\nOrderedDict\nh\x01\x85R",
        b"cbuiltins\ntuple\nh\x02\x85R",
        b"cbuiltins\nset\nh\x02\x85R",
        b"cbuiltins\nbytearray\nh\x03\x85R",
        b"c_codecs\nencode\nh\x04U\x06latin1\x86R",
        b"cpathlib\nPosixPath\nh\x04\x85R",
        b"cnumpy.core.multiarray\nscalar\nh\x05h\x03\x86R",
        b"cnumpy.core.numeric\n_frombuffer\n(h\x03h\x05)U\x01CtR",
    ],
)
def test_copies_of_one_large_object_are_counted(tmp_path, write, use):
    attributes = b"}q\x01(" + b"".join(b"U\x05a%04dN" % number for number in range(5000)) + b"u0"
    numbers = b"](" + b"K\x07" * 5000 + b"eq\x020"
    content = b"B\x50\xc3\x00\x00" + bytes(50_000) + b"q\x030" + b"X\x50\xc3\x00\x00" + b"x" * 50_000 + b"q\x040"
    dtype = b"cnumpy\ndtype\nU\x06S50000\x85Rq\x050"
    refused(
        write(tmp_path / "w.pth", Raw(attributes + numbers + content + dtype + (use + b"0") * 3000 + b"N")), "plausible"
    )


@pytest.mark.parametrize(
    "operations",
    [
        b"\x8b\xff\xff\xff\x7f1",
        b"\x8b\x00\x00\x10\x00" + b"1" * (1 << 20),
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x96\x00\x00\x00\x00\x00\x00\x00\x10",
        b"B\xff\xff\xff\xff",
        b"\x8d\x00\x00\x00\x00\x01\x00\x00\x00",
        b"L" + b"9" * 100_000 + b"L\n",
        b"S'" + b"x" * 100,
        b"(" * 1000,
        b"]" * 30_000 + b"a" * 29_999,
        b"}]q\x00h\x00aK\x01h\x00s",
        b"]q\x00h\x00a",
        b"K\x01" + b"\x85" * 300,
    ],
)
def test_attacks_on_the_reader_are_refused(tmp_path, write, operations):
    refused(write(tmp_path / "w.pth", Raw(operations)), "w.pth")


def test_a_huge_place_in_the_memo_takes_no_memory(tmp_path, write):
    path = write(tmp_path / "w.pth", Raw(b"K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff"))
    found, peak = load_and_measure(path)
    assert found == 5
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "pair", [b"h\x00h\x00\x86", b"]h\x00ah\x00a", b"cargparse\nNamespace\n)\x81}(U\x01ah\x00U\x01bh\x00ub"]
)
@pytest.mark.parametrize(
    "use", [b"", b"}h\0Ns", b"(h\0\x91", b"K\1h\0R", b"cargparse\nNamespace\nh\0R", b"Q", b"]h\0b"]
)
def test_exponential_nesting_takes_no_time(tmp_path, write, pair, use):
    operations = b")q\x000" + (pair + b"q\x000") * 50 + b"h\x00" + use
    refused(write(tmp_path / "w.pth", Raw(operations)), "w.pth" if use else "more than 10000000 items|deeper")


def test_endless_work_is_cut_short(tmp_path, write, monkeypatch):
    monkeypatch.setattr(pickle_machine, "_MAX_OPERATIONS", 1000)
    refused(write(tmp_path / "w.pth", Raw(b"K\x010" * 1000 + b"N")), "a pickle of more than 1000 operations")


# --- other files ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x80", "truncated"),
        (b"hello, world", "not a file of PyTorch: it starts with b'hello, world'"),
        (b"<!DOCTYPE html>", "not a file of PyTorch: it starts with b'<!DOCTYPE html>'"),
        (b"version https://git-lfs.github.com", "not a file of PyTorch"),
        (bytes(1000), "not a file of PyTorch"),
        (b"PK\x03\x04", "the archive's directory, at its end, is missing"),
        (b"PK\x03\x04" + bytes(1000), "the archive's directory, at its end, is missing"),
        (b"\x89HDF\r\n\x1a\n", "not a file of PyTorch"),
        (bytes(257) + b"ustar" + bytes(1000), "a tar archive"),
        (pickle.dumps({"a": 1}), "a pickle, but not of torch.save"),
        (pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1002), "format version 1002"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    refused(tmp_path / "w.pth", message)


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    refused(write_zip(path, {}, extra={"code/__torch__.py": b""}), "a TorchScript program")
    refused(write_zip(path, {}, extra={"constants.pkl": b""}), "a TorchScript program")
    refused(write_zip(path, {}, extra={"../other/data.pkl": b""}), "leads out of its folder")
    refused(write_zip(path, {}, extra={"a/../../b": b""}), "leads out of its folder")
    refused(write_zip(path, {}, extra={"byteorder": b"big"}), "byte order b'big'")
    refused(write_legacy(path, {}, little_endian=False), "byte order")
    refused(write_zip(path, {"w": tensor(FLOATS)}, compression=zipfile.ZIP_DEFLATED), "is compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "a zip archive, but not of torch.save")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled({}))
        archive.writestr("b/data.pkl", pickled({}))
    refused(path, "one folder with data.pkl, and has 2")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_members_are_refused(tmp_path):
    path = write_zip(tmp_path / "w.pth", {"w": tensor(FLOATS)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(48))
    refused(path, "'archive/data/0' twice")
    path.write_bytes(whole.replace(FLOATS.tobytes(), FLOATS.tobytes()[::-1]))
    refused(path, "'archive/data/0' does not have the checksum")
    directory = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"archive/data/0"))
    bomb = bytearray(whole)
    bomb[directory + 20 : directory + 28] = struct.pack("<2L", 1 << 31, 1 << 31)
    path.write_bytes(bomb)
    refused(path, "overlaps")
    encrypted = bytearray(whole)
    encrypted[directory + 8] |= 1
    path.write_bytes(encrypted)
    refused(path, "is encrypted")
