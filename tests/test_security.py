"""What SECURITY.md promises: nothing in a file or a value of a configuration is executed, and nothing is written
outside the folders that the user named.

Attacks on single readers are tested beside each of them: tests/convert/test_hostile_files.py (PyTorch's files),
tests/data/test_tar_names.py (indices of tarballs), test_tar_members.py, test_public_imagenet.py (archives),
tests/test_download.py (checksums), tests/data/hostile_images.py (images).
"""

from __future__ import annotations

import logging
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from urllib.request import Request

import numpy as np
import pytest

from passl import checkpoint, config, download, log
from passl.config import ConfigError
from passl.formats import paddle_reader
from passl.formats.limits import CheckpointFormatError
from passl.yaml_io import parse
from tests.engine import tiny

ROOT = Path(__file__).parents[1]

# --- files: nothing in them runs ---


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(trace):
    return {
        "os.system": Call(os.system, f"touch {trace}"),
        "eval": Call(eval, f"open({str(trace)!r}, 'w')"),
        "exec in a state": {"student.w": np.ones(2, np.float32), "x": [Call(exec, f"open({str(trace)!r}, 'w')")]},
    }


def read_weights(path):
    checkpoint.read_weights(path)


def convert_file(path):
    from passl import convert

    convert.read_backbone(path)


def read_features(path):
    from passl.data.feature_files import read_features

    read_features(path)


def read_names(path):
    from passl.data.tar_names import read_names

    read_names(path)


READERS = {
    "weights": (".pdparams", read_weights),
    "optimizer": (".pdopt", checkpoint.read),
    "states": (".pdstates", checkpoint.read_states),
    "the section Data kept in states": (".pdstates", None),
    "weights to convert": (".pdparams", convert_file),
    "PyTorch": (".pth", convert_file),
    "Lightning": (".ckpt", convert_file),
    "features": (".npy", read_features),
    "features in an archive": (".npz", read_features),
    "features of PyTorch": (".pt", read_features),
    "names in a tarball": (".npy", read_names),
}


@pytest.mark.parametrize("attack", list(payloads("")))
@pytest.mark.parametrize("reader", list(READERS))
def test_readers_execute_nothing(tmp_path, reader, attack):
    trace = tmp_path / "trace"
    payload = payloads(trace)[attack]
    suffix, read = READERS[reader]
    if read is None:
        from passl.convert.kept_data import of_prefix as read
    for protocol in (2, 4):
        path = tmp_path / f"x{protocol}{suffix}"
        with path.open("wb") as file:
            if suffix == ".npy":
                np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
            if suffix == ".npz":
                np.savez(file, features=np.array(payload, object))
            else:
                pickle.dump(payload, file, protocol)
        with pytest.raises((ValueError, OSError, CheckpointFormatError)) as error:
            read(path)
        assert str(path) in str(error.value)
        assert not trace.exists()


def test_a_run_refuses_a_checkpoint_that_would_execute_something(tmp_path):
    tiny.write_images(tmp_path)
    made = tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    assert tiny.run(tiny.TRAIN, "-c", made, *tiny.overrides(Global__max_train_step=1)).returncode == 0
    prefix, trace = tmp_path / "out/DINO/latest", tmp_path / "trace"
    with checkpoint.with_suffix(prefix, checkpoint.STATES).open("wb") as file:
        pickle.dump({"step": 1, "config": Call(os.system, f"touch {trace}")}, file)
    done = tiny.run(tiny.TRAIN, "-c", made, *tiny.overrides(Global__checkpoint=prefix))
    assert done.returncode == 1
    assert "the file asks for posix.system, which is no part of a file of weights: refused" in done.stderr
    assert not trace.exists()


def test_a_file_of_weights_changes_nothing_in_the_program(tmp_path):
    # BUILD gives a state to whatever stands before it, here a function that arrays are read with.
    change = pickle.NONE + pickle.EMPTY_DICT + b"\x8c\x0c__defaults__" + b"K\x01\x85" + pickle.SETITEM + b"\x86"
    for name in (b"_codecs\nencode\n", b"numpy\nndarray\n", b"collections\nOrderedDict\n", b"builtins\ntuple\n"):
        (tmp_path / "w.pdparams").write_bytes(b"\x80\x04c" + name + change + pickle.BUILD + b".")
        with pytest.raises(checkpoint.CheckpointError, match="changes something that is no array: refused"):
            checkpoint.read_weights(tmp_path / "w")
    assert paddle_reader._latin1_bytes.__defaults__ is None


def test_an_exported_file_holds_three_names_and_nothing_else(tmp_path):
    from passl import exported

    path = tmp_path / "x.passl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../evil", "/etc/evil", exported.META):
            archive.writestr(name, "x")
    with pytest.raises(exported.ExportError, match="not a file of passl-export: it contains"):
        exported.unpack(path, tmp_path / "folder")
    assert not (tmp_path / "evil").exists()


# --- archives: nothing leaves its folder ---


@pytest.mark.parametrize("name", ["../evil.JPEG", "/tmp/evil.JPEG", "a/../../evil.JPEG", "n01440764/x\x1b.JPEG"])
def test_members_cannot_leave_their_folder(tmp_path, name):
    from passl.data.public.imagenet import val_source

    (tmp_path / "labels.txt").write_text("1\n" * 50_000)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="refused"):
        list(val_source(tmp_path / "val.tar", _csv(tmp_path)).units[0].images(0))
    assert not list(tmp_path.parent.glob("evil*"))


def _csv(folder):
    path = folder / "LOC_val_solution.csv"
    rows = [f"ILSVRC2012_val_{number:08d},n{number % 1000:08d} 1 2 3 4" for number in range(1, 50_001)]
    path.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return path


def test_a_tarball_of_several_is_in_its_folder(tmp_path):
    from passl.data.tar_dataset import TarDataset
    from passl.data.tar_members import TarError
    from passl.data.tar_names import NamesBuilder, write_names

    np.save(tmp_path / "pretrain_entries.npy", np.array([[0, 0, 512, 513, 0]], np.uint64))
    names = NamesBuilder()
    names.add(0, b"../elsewhere")
    with (tmp_path / "cohort_indices.npy").open("wb") as file:
        write_names(file, names.build())
    with pytest.raises(TarError, match=r"names the tarball '../elsewhere', which is no name in its folder: refused"):
        TarDataset(tmp_path)


def test_the_hub_cannot_choose_another_folder(tmp_path):
    pytest.importorskip("huggingface_hub")
    from passl.data.public.hub import Hub, HubError

    for name in ("../../train-0.parquet", "/etc/train-0.parquet"):
        with pytest.raises(HubError, match="leads out of"):
            Hub(tmp_path, token="hf_x").fetch(name)


# --- downloads ---


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "ftp://host/weights.pth", "data:text/plain,x", "weights.pth"]
)
def test_only_addresses_of_the_web_are_fetched(tmp_path, address):
    with pytest.raises(download.DownloadError, match="only http and https addresses are fetched"):
        download.fetch(address, tmp_path, lambda file: None)
    assert not list(tmp_path.iterdir())


def test_the_addresses_in_the_source_are_https():
    from passl.data.public import cifar
    from passl.models import hub

    addresses = [model.address for model in hub.OFFICIAL.values()]
    addresses += cifar._MIRRORS
    assert len(addresses) > 8
    assert all(address.startswith("https://") for address in addresses)


@pytest.mark.parametrize(
    ("before", "after", "follows"),
    [
        ("https://a/x", "https://b/x", True),
        ("http://a/x", "https://b/x", True),
        ("http://a/x", "http://b/x", True),
        ("https://a/x", "http://b/x", False),
        ("https://a/x", "ftp://b/x", False),
        ("http://a/x", "ftp://b/x", False),
        ("http://a/x", "file:///etc/passwd", False),
    ],
)
def test_a_server_cannot_lead_to_less_than_https(before, after, follows):
    redirects = download._Redirects()
    if follows:
        assert redirects.redirect_request(Request(before), None, 302, "Found", {}, after).full_url == after
        return
    with pytest.raises(OSError, match="which is not HTTPS: refused"):
        redirects.redirect_request(Request(before), None, 302, "Found", {}, after)


# --- configurations ---


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "a: !!python/name:os.system",
        "a: !include {}",
    ],
)
def test_tags_are_no_code(tmp_path, text):
    trace = tmp_path / "trace"
    with pytest.raises(ConfigError, match=r"tag '.*' is not allowed"):
        parse(text.replace("{}", str(trace)), "x.yaml")
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]),
        "\n".join(["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))]),
        "[" * 20_000,
    ],
    ids=["aliases of aliases", "merged merges", "depth"],
)
def test_a_small_text_takes_no_endless_memory(text):
    with pytest.raises(ConfigError, match=r"more than 1000000|nested too deeply"):
        parse(text, "x.yaml")


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["../x", "../../x", "/tmp/x", "a/b", "..", ".", "", "a\\b", "a\nb"])
def test_a_run_s_name_is_one_folder(tmp_path, name):
    from passl.engine import run

    path = tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    given = config.load(path)
    given["Global"]["name"] = name
    with pytest.raises(ConfigError, match=r"Global.name \(.*\) must be the name of one folder, without '/'"):
        run.checked(given, training=True)


@pytest.mark.parametrize(
    "override",
    [
        "Model.name=__import__('os').system('touch {}')",
        "Schedules.lr.base=__import__('os').system('touch {}')",
        "Model.backbone.name=$(touch {})",
        "Global.output_dir=$(touch {})/out",
        "DataLoader.Train.dataset.root=`touch {}`",
        "Global.device=;touch {}",
    ],
)
def test_values_reach_no_evaluation_and_no_shell(tmp_path, override):
    trace = tmp_path / "trace"
    tiny.write_images(tmp_path, train=2)
    path = tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    # Where the value is a plain folder's name the run may go on: it must not end in the shell either.
    options = [*tiny.overrides(Global__max_train_step=1), "-o", override.replace("{}", str(trace))]
    tiny.run(tiny.TRAIN, "-c", path, *options, cwd=tmp_path)
    assert not trace.exists()


def test_features_of_regions_stay_in_the_run_s_folder():
    from passl.evaluators import RegionExtraction

    for folder in ("../x", "a/../../x", "/a/../x"):
        with pytest.raises(ValueError, match="must not lead out of the run's folder"):
            RegionExtraction(None, folder=folder)


# --- names in messages ---


def test_names_of_files_do_not_steer_a_terminal(tmp_path, capsys):
    name = "\x1b]0;title\x07\x1b[2J\u202egpj.x\r.jpg"
    log.setup(tmp_path / "x.log")
    try:
        logging.getLogger("passl").warning("unreadable: %s\nsecond line: é", name)
    finally:
        log.setup()
    for text in (capsys.readouterr().err, (tmp_path / "x.log").read_text("utf-8")):
        assert "\\x1b]0;title\\x07\\x1b[2J\\u202egpj.x\\r.jpg\nsecond line: é" in text
        assert "\x1b" not in text
    from passl.cli.common import stop

    with pytest.raises(SystemExit):
        stop(ValueError(name), 1)
    assert "\x1b" not in capsys.readouterr().err
