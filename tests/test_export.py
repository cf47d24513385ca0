"""passl-export: the same numbers as the network's own, and the command."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl import exported
from passl.cli import export_main
from passl.config import ConfigError
from passl.data.datasets import ImageFolder
from passl.engine.export import _configured_size, _preprocessing
from passl.evaluators.knn import knn_classify
from passl.export import check_differences, check_onnx, comparison_shapes, export
from passl.exported import ExportedNetwork, ExportError
from passl.models import LinearProbe, ResNet, VisionTransformer, XCiT
from passl.models.exportable import FeatureNetwork, KNNNetwork, ProbeNetwork
from tests.engine import tiny

EXPORT = "from passl.cli import export_main; export_main()"
IS_PADDLE_2 = paddle.__version__.startswith("2.")
PREPROCESSING = exported.standard_preprocessing(32, 32)


def vit(**more):
    return VisionTransformer(32, 8, 3, 12, 2, 2, **more)


def images(batch, height, width):
    return np.random.default_rng(batch + height).standard_normal((batch, 3, height, width)).astype(np.float32)


def expected(network, batch):
    network.eval()
    with paddle.no_grad():
        return [output.numpy() for output in network(paddle.to_tensor(batch))]


def assert_same(file, network, shape):
    batch = images(*shape)
    results = ExportedNetwork(file)(batch)
    assert list(results) == list(network.outputs)
    for one, other in zip(results.values(), expected(network, batch)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=5e-6)


@pytest.fixture(params=["paddle", "onnx"])
def export_type(request):
    if request.param == "onnx":
        if IS_PADDLE_2:
            pytest.skip("paddle2onnx needs Paddle 3")
        for module in ("paddle2onnx", "onnx", "onnxruntime"):
            pytest.importorskip(module)
    return request.param


@pytest.fixture
def file(tmp_path, export_type):
    return tmp_path / f"net{exported.SUFFIXES[export_type]}"


# --- numbers ---


@pytest.mark.smoke
def test_a_transformer_of_any_size(file, export_type):
    network = FeatureNetwork(VisionTransformer(64, 16, 3, 12, 2, 2))
    meta = export(network, file, PREPROCESSING, export_type=export_type)
    assert meta.input_shape == [None, 3, None, None]
    for shape in ((1, 64, 64), (3, 48, 112), (2, 128, 16), (1, 80, 80)):
        assert_same(file, network, shape)
    with pytest.raises(ExportError, match=r"takes images \[B, 3, any multiple of 16 x any multiple of 16\], not"):
        ExportedNetwork(file)(images(1, 64, 33))


@pytest.mark.smoke
def test_a_probe_gives_classes_and_the_backbone_s_features(file, export_type):
    probe = LinearProbe(vit, 5, 2, avgpool=True)
    network = ProbeNetwork(probe)
    export(network, file, PREPROCESSING, 32, 32, export_type, list("abcde"))
    batch = images(3, 32, 32)
    results = ExportedNetwork(file)(batch)
    backbone, logits = (f(paddle.to_tensor(batch)).numpy() for f in (probe.backbone, probe.predict))
    np.testing.assert_allclose(results["features"], backbone, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(results["logits"], logits, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(results["probabilities"].sum(1), 1, rtol=0, atol=1e-6)
    with pytest.raises(ExportError, match=r"takes images \[B, 3, 32 x 32\], not \[1, 3, 40, 32\]"):
        ExportedNetwork(file)(images(1, 40, 32))


@pytest.mark.parametrize("avgpool", [False, True])
@pytest.mark.parametrize("backbone", [vit, lambda: ResNet((1, 1, 1, 1), width=4)])
def test_the_backbone_s_output_in_a_probe_s_features(backbone, avgpool):
    probe = LinearProbe(backbone, 5, 2, avgpool=avgpool)
    batch = paddle.randn([2, 3, 32, 32])
    assert (probe.backbone_output(probe.features(batch)) == probe.backbone(batch)).all()


@pytest.mark.parametrize(
    ("backbone", "side"), [(lambda: ResNet((1, 1, 1, 1), width=4), None), (lambda: XCiT(8, 3, 12, 2, 2), 32)]
)
def test_other_backbones(file, export_type, backbone, side):
    network = FeatureNetwork(backbone())
    export(network, file, PREPROCESSING, side, side, export_type)
    assert_same(file, network, (2, 32, 32))
    if side is None:
        assert_same(file, network, (2, 61, 45))


class Odd(paddle.nn.Layer):
    """A backbone whose output is what ``form`` makes of the images."""

    embed_dim = 3

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: x.mean([2, 3], keepdim=True), r"Odd must give features \[B, D\], and gives \[1, 3, 1, 1\]"),
        (lambda x: {"features": x.mean([2, 3])}, r"Odd gives no features for images \[1, 3, 32, 32\]: AttributeError"),
    ],
)
def test_a_backbone_without_features_says_so(tmp_path, form, message):
    with pytest.raises(ExportError, match=message):
        export(FeatureNetwork(Odd(form)), tmp_path / "x.passl", PREPROCESSING, 32, 32)
    assert not list(tmp_path.iterdir())


def test_each_class_has_a_name(tmp_path):
    with pytest.raises(ExportError, match="class_names has 2 names, and the network 5 classes"):
        export(ProbeNetwork(LinearProbe(vit, 5, 2)), tmp_path / "x.passl", PREPROCESSING, 32, 32, class_names="ab")


def test_a_backbone_of_one_size_says_so(tmp_path):
    with pytest.raises(ExportError, match="XCiT cannot be made a static program for any image size .*need a fixed"):
        export(FeatureNetwork(XCiT(8, 3, 12, 2, 2)), tmp_path / "x.passl", PREPROCESSING)
    assert not list(tmp_path.iterdir())


@pytest.mark.smoke
def test_a_bank_votes_as_the_evaluator(file, export_type):
    k = 7
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((40, 12)).astype(np.float32)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    labels = np.arange(40) % 5
    assert KNNNetwork(vit(), bank, labels, 5, k=1000).k == 40
    network = KNNNetwork(vit(), bank, labels, 5, k=k, temperature=0.1)
    export(network, file, PREPROCESSING, 32, 48, export_type, list("abcde"))
    results = ExportedNetwork(file)(images(6, 32, 48))
    rows = results["features"] / np.linalg.norm(results["features"], axis=1, keepdims=True)
    votes = knn_classify(bank, labels, rows, [k], temperature=0.1)[k]
    np.testing.assert_allclose(results["probabilities"], votes / votes.sum(1, keepdims=True), rtol=0, atol=1e-5)


def test_differences_are_errors():
    row = {"engine": "Paddle inference", "shape": [1, 3, 8, 8], "largest": {"features": 2.0}}
    check_differences([{**row, "difference": {"features": 1.9e-4}}])
    for value in (2.1e-4, float("nan")):
        with pytest.raises(ExportError, match=r"images \[1, 3, 8, 8\]: features \(up to 2.0e\+00\) differs by"):
            check_differences([{**row, "difference": {"features": value}}])


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("passl.export.exported.paddle_engine", lambda folder: lambda x: [np.zeros((len(x), 12), "f4")])
    with pytest.raises(ExportError, match="nothing is written"):
        export(FeatureNetwork(vit()), tmp_path / "x.passl", PREPROCESSING, 32, 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [SystemExit(1), RuntimeError("no such operator"), None])
def test_what_paddle2onnx_says_when_it_fails(tmp_path, monkeypatch, failure, capfd):
    converter = pytest.importorskip("paddle2onnx")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def fail(*arguments, **options):
        print("Operator X is not supported")
        if failure is not None:
            raise failure

    monkeypatch.setattr(converter, "export", fail)
    with pytest.raises(ExportError, match="cannot convert this network:\nOperator X is not supported"):
        export(FeatureNetwork(vit()), tmp_path / "x.onnx", PREPROCESSING, 32, 32, "onnx")
    assert not list(tmp_path.iterdir())
    print("as before")
    assert capfd.readouterr().out == "as before\n"


@pytest.mark.smoke
def test_paddle_2_writes_no_onnx(tmp_path, monkeypatch):
    monkeypatch.setattr(paddle, "__version__", "2.6.2")
    with pytest.raises(ExportError, match=r"ONNX needs Paddle 3, and this is 2.6.2: upgrade it, or"):
        check_onnx()


def test_comparison_shapes_are_of_several_batches_and_rectangles():
    assert {batch for batch, *_ in comparison_shapes(32, 48, 8)} == {1, 2, 5}
    shapes = comparison_shapes(None, None, 14)
    assert all(height % 14 == width % 14 == 0 for _, height, width in shapes)
    assert (
        {height > width for _, height, width in shapes}
        == {height < width for _, height, width in shapes}
        == {True, False}
    )


# --- the command ---


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        (None, None),
        ([None, 3, 224, 224], (224, 224)),
        (["None", 3, -1, -1], (None, None)),  # PASSL's files are read by Python there
        ([3, 96, 160], (96, 160)),
    ],
)
def test_input_shape_of_a_configuration(shape, sides):
    assert _configured_size(shape) == sides


@pytest.mark.parametrize("shape", [[], [224], [None, 1, 224, 224], [1, 1, 3, 8, 8], [None, 3, "x", 224]])
def test_wrong_input_shapes(shape):
    with pytest.raises(ConfigError, match=r"Export.input_shape .* must be \[null, 3, height, width\]"):
        _configured_size(shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny.write_images(folder)
    paddle.seed(0)
    probe = LinearProbe(lambda: VisionTransformer(16, 8, 3, 12, 2, 2), 3, 2)
    tiny.checkpoint.write(probe.state_dict(), folder / "probe.pdparams")
    tiny.checkpoint.write(probe.backbone.state_dict(), folder / "backbone.pdparams")
    export_section = "Export: {{export_type: paddle, input_shape: [null, 3, 16, 16]}}\n"
    tiny.write_config(folder, tiny.PROBE + export_section, "probe.yaml")
    return folder


@pytest.mark.smoke
def test_a_probe_by_its_configuration(folder, tmp_path):
    out = tmp_path / "probe.passl"
    weights = ["-o", f"Global.pretrained_model={folder}/probe"]
    done = tiny.run(EXPORT, "-c", folder / "probe.yaml", *weights, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Paddle inference    2 x 3 x 16 x 16" in done.stdout
    assert "3 classes (linear), images 16 x 16" in done.stdout
    network = ExportedNetwork(out)
    assert network.meta.class_names == ["class0", "class1", "class2"]
    # The file's own preprocessing is the evaluator's.
    transform = exported.transform(network.meta.preprocessing)
    dataset = ImageFolder(folder / "val")
    probe = LinearProbe(lambda: VisionTransformer(16, 8, 3, 12, 2, 2), 3, 2)
    tiny.checkpoint.load_weights(probe, tiny.checkpoint.read_weights(folder / "probe"))
    batch = np.stack([transform(dataset.load(index)) for index in range(len(dataset))])
    logits = probe.predict(paddle.to_tensor(batch)).numpy()
    np.testing.assert_allclose(network(batch)["logits"], logits, rtol=1e-5, atol=5e-6)


@pytest.mark.smoke
def test_a_backbone_with_a_bank_by_its_name(folder, tmp_path):
    arch = [f"--set={text}" for text in ("img_size=16", "patch_size=8", "embed_dim=12", "depth=2", "num_heads=2")]
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nblue\n")
    options = ["--pretrained-model", folder / "backbone", "--image-size", "16x24", "--k", "3"]
    options += ["--knn-bank", folder / "train", "--class-names", names, "--out", tmp_path / "a.passl"]
    done = tiny.run(EXPORT, "--arch", "VisionTransformer", *arch, *options)
    assert done.returncode == 0, done.stderr
    network = ExportedNetwork(tmp_path / "a.passl")
    assert network.meta.class_names == ["red", "green", "blue"]
    assert network.meta.classifier == {"kind": "knn", "k": 3, "temperature": 0.07, "images": 15}
    transform = exported.transform(network.meta.preprocessing)
    trained = ImageFolder(folder / "train")
    results = network(np.stack([transform(trained.load(index)) for index in range(15)]))
    assert (results["probabilities"].argmax(1) == trained.labels).mean() > 0.9


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["-c", "probe.yaml", "-o", "Global.pretrained_model=backbone"], 1, "only a backbone"),
        (["-c", "probe.yaml", "-o", "Export.input_shape=[3]"], 2, "Export.input_shape ([3]) must be [null, 3, height"),
        (["-c", "probe.yaml", "--image-size", "20"], 1, "image size 20 x 20: both must be multiples of 8"),
        (["--arch", "vit_smal"], 2, "Did you mean 'vit_small'?"),
        (["--arch", "vit_tiny", "--knn-bank", "nowhere"], 1, "--knn-bank: there is no folder nowhere"),
        (["-c", "probe.yaml", "--out", "x.pt"], 1, "must end in .passl"),
        (["-c", "probe.yaml", "-o", "Global=x", "--pretrained-model", "y"], 2, "Global: expected a mapping"),
        (["--arch", "vit_tiny", "--knn-bank", "train", "--k", "0"], 1, "k (0) must be at least 1"),
        (
            ["--arch", "vit_tiny", "-o", "Model.patch_size=8"],
            2,
            "-o changes a configuration (-c): use --set patch_size=8",
        ),
        (["--arch", "vit_tiny", "--class-names", "probe.yaml"], 1, "a backbone alone has no classes"),
        (["-c", "probe.yaml", "--set", "depth=1"], 2, "--set is for --arch: use -o Model.depth=1"),
        (["--arch", "vit_tiny", "--set", "depth"], 2, "--set depth: expected KEY=VALUE"),
        (["--image-size", "a", "--arch", "vit_tiny"], 2, "'a' must be a side such as 224"),
    ],
)
def test_what_the_command_refuses(folder, options, code, text, monkeypatch, capsys):
    # What would change this process for the tests after it.
    monkeypatch.setattr("passl.engine.subject.run.set_up", lambda settings: None)
    monkeypatch.setattr("passl.engine.subject.log.setup", lambda: None)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        export_main(options)
    assert stopped.value.code == code
    assert text in capsys.readouterr().err
    assert not list(folder.glob("*.passl"))


def test_preprocessing_is_that_of_the_images_classes_are_measured_on():
    steps = [{"Resize": {"size": 40}}, {"CenterCrop": {"size": 32}}, {"ToTensor": {}}, {"Normalize": {}}]
    dataset = {"name": "ImageFolder", "root": "val", "transform": steps}
    for spec in ({"name": "Classification", "dataset": dataset}, {"name": "KNN", "val_dataset": dataset}):
        assert _preprocessing({"Evaluators": [spec]}, None) == (steps, (32, 32))
