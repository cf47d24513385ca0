"""The files of passl-export: nothing else is read, and what is damaged says so."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import paddle
import pytest

from passl import exported
from passl.export import export
from passl.exported import ExportedNetwork, ExportError, Meta
from passl.models import LinearProbe, VisionTransformer
from passl.models.exportable import FeatureNetwork, ProbeNetwork

PREPROCESSING = exported.standard_preprocessing(32, 32)


def vit():
    return VisionTransformer(32, 8, 3, 12, 2, 2)


def images(batch, height, width):
    return np.zeros((batch, 3, height, width), np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "net.passl"
    export(FeatureNetwork(vit()), path, PREPROCESSING, 32, 32, architecture={"name": "vit"}, raw=path.with_name("raw"))
    return path


def repacked(small, target, compression=zipfile.ZIP_STORED, **changed):
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for name in source.namelist():
            if name not in changed:
                archive.writestr(name, source.read(name))
        for name, content in changed.items():
            if content is not None:
                archive.writestr(name, content)
    return target


@pytest.mark.smoke
def test_what_is_in_the_file(small):
    with zipfile.ZipFile(small) as archive:
        meta = json.loads(archive.read(exported.META))
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        for name in archive.namelist():
            assert (small.with_name("raw") / name).read_bytes() == archive.read(name)
    assert meta["preprocessing"] == PREPROCESSING
    assert meta["architecture"] == {"name": "vit"}
    assert meta["versions"]["paddle"] == paddle.__version__
    assert len(meta["comparison"]) == 3
    assert Meta.from_json(json.dumps(meta)).to_json() == json.dumps(meta, indent=1)


def test_other_files_are_refused(small, tmp_path):
    broken = bytearray(small.read_bytes())
    broken[len(broken) // 2] ^= 1
    with zipfile.ZipFile(small) as archive:
        meta = json.loads(archive.read(exported.META))
    cases = {
        "is not a zip file": b"hello",
        "damaged": bytes(broken),
        "not a zip file|damaged": small.read_bytes()[:-200],
        "it contains": repacked(small, tmp_path / "a", **{"../../evil": "x"}).read_bytes(),
        "compressed": repacked(small, tmp_path / "a", zipfile.ZIP_DEFLATED).read_bytes(),
        "it contains .*pdiparams": repacked(small, tmp_path / "a", **{"meta.json": None}).read_bytes(),
        "no JSON": repacked(small, tmp_path / "a", **{"meta.json": "{"}).read_bytes(),
        "not written by passl-export": repacked(small, tmp_path / "a", **{"meta.json": "{}"}).read_bytes(),
        "newer passl": repacked(small, tmp_path / "a", **{"meta.json": '{"passl_export": 99}'}).read_bytes(),
        "step .*Solarize": repacked(
            small, tmp_path / "a", **{"meta.json": json.dumps({**meta, "preprocessing": [{"Solarize": {}}]})}
        ).read_bytes(),
        "input shape": repacked(
            small, tmp_path / "a", **{"meta.json": json.dumps({**meta, "input_shape": [1, "x"]})}
        ).read_bytes(),
    }
    for message, content in cases.items():
        path = tmp_path / "bad.passl"
        path.write_bytes(content)
        with pytest.raises(ExportError, match=message) as caught:
            ExportedNetwork(path)
        assert str(path) in str(caught.value)


def test_a_file_whose_parts_do_not_belong_together(small, tmp_path):
    with zipfile.ZipFile(small) as archive:
        meta = json.loads(archive.read(exported.META))
        program = next(name for name in archive.namelist() if name in exported.PROGRAMS)
        parts = {name: archive.read(name)[:100] for name in (program, exported.WEIGHTS)}
    for changed in ({name: part} for name, part in parts.items()):
        with pytest.raises(ExportError, match="damaged: Paddle cannot open its program or weights"):
            ExportedNetwork(repacked(small, tmp_path / "x.passl", **changed))
    for values, shape, message in (
        ({"outputs": ["features", "logits"]}, (1, 32, 32), "its outputs are not features, logits"),
        (
            {"outputs": ["features", "probabilities"], "class_names": ["a"]},
            (1, 32, 32),
            "its outputs are not features, probabilities",
        ),
        ({"input_shape": [None, 4, 32, 32]}, (1, 32, 32), r"takes images \[B, 4, 32 x 32\]"),
        ({"input_shape": [None, 3, 64, 64]}, (1, 64, 64), r"x.passl fails on images \[1, 3, 64, 64\]"),
    ):
        file = repacked(small, tmp_path / "x.passl", **{exported.META: json.dumps({**meta, **values})})
        with pytest.raises(ExportError, match=message):
            ExportedNetwork(file)(images(*shape))
    names = {"outputs": ["probabilities"], "class_names": ["a"]}
    file = repacked(small, tmp_path / "x.passl", **{exported.META: json.dumps({**meta, **names})})
    with pytest.raises(ExportError, match="its outputs are"):
        ExportedNetwork(file)


def test_a_file_with_other_names_than_classes(tmp_path):
    path = tmp_path / "x.passl"
    export(ProbeNetwork(LinearProbe(vit, 5, 2)), path, PREPROCESSING, 32, 32, class_names="abcde")
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read(exported.META))
    bad = repacked(path, tmp_path / "y.passl", **{exported.META: json.dumps({**meta, "class_names": ["a"]})})
    with pytest.raises(ExportError, match="y.passl: damaged, it has 5 classes and 1 names"):
        ExportedNetwork(bad)(images(1, 32, 32))


def test_a_program_of_paddle_3_does_not_crash_paddle_2(small, monkeypatch):
    if paddle.__version__.startswith("2."):
        pytest.skip("cannot write such a file")
    monkeypatch.setattr(paddle, "__version__", "2.6.2")
    with pytest.raises(ExportError, match="written by Paddle 3, and this is Paddle 2.6.2"):
        ExportedNetwork(small)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.onnx").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r'onnxruntime is not installed: pip install "passl\[onnx\]"'):
        ExportedNetwork(tmp_path / "x.onnx")


def test_sizes_of_preprocessing():
    assert exported.output_size(exported.standard_preprocessing(224, 224)) == (224, 224)
    assert exported.output_size(exported.standard_preprocessing(96, 160)) == (96, 160)
    assert exported.output_size([{"Resize": {"size": 64}}, {"ToTensor": {}}]) == (None, None)
    own = [{"CenterCrop": {"size": 40}}, {"ToTensor": {}}, {"Normalize": {"mean": [0, 0, 0], "std": [1, 1, 1]}}]
    assert exported.at_size(own, 16, 24)[-1] == own[-1]
    assert exported.output_size(exported.at_size(own, 16, 24)) == (16, 24)
    with pytest.raises(ExportError, match="must end in ToTensor"):
        exported.output_size([{"Resize": {"size": 64}}])
