"""``report.html``, and what VisualDL gets of it: read back, and looked at in a browser where there is one."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from visualdl import LogReader

from passl.cli import eval_main, train_main, visualize_main
from passl.engine.gallery import Gallery, dataset_of
from passl.engine.report import ReportError, write_report
from passl.engine.reporting import ReportHook
from passl.engine.settings import ReportSettings
from passl.log import MetricsFile
from passl.models import RegionTransformer, VisionTransformer
from tests.browser import page_dom
from tests.engine import tiny

REPORT = "Global.report={images: 2, points: 6, method: pca}"
KNN = """
Evaluators:
  - name: KNN
    k: [3]
    train_dataset: {{name: ImageFolder, root: {folder}/train, transform: &eval [ToTensor: {{}}, Normalize: {{}}]}}
    val_dataset: {{name: ImageFolder, root: {folder}/val, transform: *eval}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    tiny.write_images(folder, size=16)
    tiny.write_config(folder, tiny.PRETRAIN + KNN, "pretrain.yaml")
    tiny.write_config(folder, tiny.PROBE, "probe.yaml")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A pre-training that wrote its report."""
    train_main(["-c", str(folder / "pretrain.yaml"), "-o", REPORT, "-o", "Global.use_visualdl=true"])
    return folder / "out/DINO"


def test_a_training_ends_with_its_report(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["phase"] == "eval"][-1]
    assert f'<td>knn_top1_k3</td><td class="number">{last["knn_top1_k3"]:.2f}' in page
    for part in ("Results", "Curves", "Attention", "Map of features", "Timings", "Configuration"):
        assert f"<h2>{part}" in page
    assert "save_interval: 2it" in page  # of the configuration
    assert_needs_nothing_else(page)


def assert_needs_nothing_else(page: str) -> None:
    assert not re.findall(r"(?:src|href)=(?:\"(?!data:)|'(?!data:)|[^\"'])|url\((?!data:)|@import", page)


def test_visualdl_has_the_same_curves_pictures_and_features(run: Path) -> None:
    (file,) = (run / "vdl").glob("*.log")
    reader = LogReader(file_path=str(file))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for phase, key in (("train", "loss"), ("train", "lr"), ("eval", "knn_top1_k3")):
        wanted = [(row["step"], row[key]) for row in rows if row["phase"] == phase]
        found = [(one.id, one.value) for one in reader.get_data("scalar", f"{phase}/{key}")]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        np.testing.assert_allclose([value for _, value in found], [value for _, value in wanted], rtol=1e-6)
    for tag, name in (("report/attention", "attention.png"), ("report/embeddings", "embeddings.png")):
        (record,) = reader.get_data("image", tag)
        shown = np.asarray(Image.open(io.BytesIO(record.image.encoded_image_string)).convert("RGB"))
        np.testing.assert_array_equal(shown, np.asarray(Image.open(run / "report" / name).convert("RGB")))
    (record,) = reader.get_data("embeddings", "report/features")
    features = np.array([list(one.vectors) for one in record.embeddings.embeddings])
    assert features.shape == (6, 12)
    assert {one.label[0] for one in record.embeddings.embeddings} <= {"class0", "class1", "class2"}


def test_a_browser_shows_it(run: Path) -> None:
    dom = page_dom(run / "report.html")
    assert dom.count("<figure") >= 2
    assert "knn_top1_k3" in dom


def test_an_evaluation_ends_with_its_report_too(folder: Path, run: Path) -> None:
    place = ["-o", f"Global.output_dir={folder}/eval", "-o", "Global.name=k-NN", "-o", "Global.use_visualdl=true"]
    eval_main(
        ["-c", str(folder / "pretrain.yaml"), "--report", "-o", REPORT, *place]
        + ["-o", f"Global.pretrained_model={run / 'latest'}"]
    )
    found = folder / "eval/k-NN"
    page = (found / "report.html").read_text(encoding="utf-8")
    value = json.loads((found / "eval.json").read_text())["knn_top1_k3"]
    assert f"{value:.2f}" in page
    assert "Map of features" in page
    assert "<td>evaluation</td>" in page  # how long they took
    (file,) = (found / "vdl").glob("*.log")
    (scalar,) = LogReader(file_path=str(file)).get_data("scalar", "eval/knn_top1_k3")
    assert scalar.value == pytest.approx(value)


def test_a_network_without_attention_says_so(folder: Path) -> None:
    model = "Model={name: ResNet, depths: [1, 1, 1, 1], bottleneck: false, width: 4}"
    eval_main(["-c", str(folder / "pretrain.yaml"), "-o", REPORT, "-o", model, "-o", "Global.name=convnet"])
    page = (folder / "out/convnet/report.html").read_text(encoding="utf-8")
    assert "none: ResNet has no [CLS] token" in page
    assert "Map of features" in page


def test_a_stopped_run_writes_none_and_the_one_that_goes_on_does(folder: Path) -> None:
    config = ["-c", str(folder / "probe.yaml"), "-o", REPORT, "-o", "Global.name=stopped"]
    stop_after_two = tiny.KILLED_AT.format(step=2).replace("SIGKILL", "SIGTERM")
    assert tiny.run(stop_after_two + tiny.TRAIN, *config).returncode == 75
    assert not (folder / "out/stopped/report.html").exists()
    train_main([*config, "-o", "Global.checkpoint=auto"])
    assert (folder / "out/stopped/report.html").is_file()


def test_images_that_cannot_be_shown_do_not_fail_the_run(folder: Path, tmp_path: Path) -> None:
    tiny.write_images(tmp_path, classes=1, train=9, val=2, size=16)
    Image.new("RGB", (33, 20)).save(tmp_path / "train/class0/odd.png")
    config = tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    odd = f"DataLoader.Eval={{dataset: {{name: ImageFolder, root: {tmp_path}/train}}, sampler: {{batch_size: 2}}}}"
    train_main(["-c", str(config), "-o", REPORT, "-o", odd, "-o", "Global.eval_during_train=false"])
    assert (tmp_path / "out/DINO/latest.pdparams").is_file()
    assert (tmp_path / "out/DINO/report.html").is_file()


def test_a_report_that_fails_does_not_fail_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory on the device")

    monkeypatch.setattr("passl.engine.gallery.project", fail)
    train_main(["-c", str(folder / "pretrain.yaml"), "-o", REPORT, "-o", "Global.name=broken"])
    page = (folder / "out/broken/report.html").read_text(encoding="utf-8")
    assert "none: out of memory on the device" in page
    assert "<h2>Attention" in page
    # Nothing can be drawn: the numbers are shown all the same.
    monkeypatch.setattr("passl.engine.gallery.Gallery.make", fail)
    again = ["-o", "Global.name=broken", "-o", "Global.checkpoint=auto"]
    (folder / "out/broken/report.html").unlink()
    train_main(["-c", str(folder / "pretrain.yaml"), "-o", REPORT, *again])
    assert "<h2>Curves" in (folder / "out/broken/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("method", "module"), [("umap", "umap"), ("tsne", "sklearn")])
def test_what_a_map_needs_is_asked_for_before_the_training(
    folder: Path, method: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        train_main(["-c", str(folder / "pretrain.yaml"), "-o", f"Global.report={{method: {method}}}"])
    assert ended.value.code == 2
    assert f"{module} is not installed: pip install" in capsys.readouterr().err


def test_weights_in_half_precision_get_inputs_that_are_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = []

    class HalfPrecision:
        level = "O2"

        @contextlib.contextmanager
        def autocast(self) -> Iterator[None]:
            inside.append("cast")
            yield
            inside.append("end")

    monkeypatch.setattr("passl.engine.reporting._write", lambda *_: inside.append("report"))
    log = SimpleNamespace(folder=tmp_path, writer=None, evaluation_seconds=1.0)
    trainer = SimpleNamespace(step=2, stop_step=2, is_interrupted=False, method=None, precision=HalfPrecision())
    ReportHook(ReportSettings(), {}, log).after_train(trainer)
    assert inside == ["cast", "report", "end"]


# --- the images ------------------------------------------------------------------------------------------------------


def gallery_of(folder: Path, dataset: dict, backbone: object) -> tuple[dict, str]:
    """Notes and map of the gallery with the images of `dataset`."""
    gallery = Gallery(ReportSettings(2, 8, "pca"), folder)
    gallery.make(backbone, {"DataLoader": {"Train": {"dataset": dataset}}}, 0)
    return gallery.notes, (folder / "report/embeddings.fragment.html").read_text(encoding="utf-8")


def test_labels_without_names_have_their_numbers(folder: Path, tmp_path: Path) -> None:
    lines = [f"class{label}/{number}.png,{label * 7}" for label in range(3) for number in range(2)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    dataset = {"name": "ImageList", "root": f"{folder}/train", "list_file": f"{tmp_path}/list.csv"}
    dataset["transform"] = [{"ToTensor": {}}, {"Normalize": {}}]
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2)
    notes, shown = gallery_of(tmp_path, dataset, backbone)
    assert "no_map" not in notes
    assert [name in shown for name in ('"name":"0"', '"name":"7"', '"name":"14"', '"name":"1"')] == [True] * 3 + [False]


def test_regions_of_features_are_shown_whole(tmp_path: Path) -> None:
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).normal(size=(16, 6)).astype("float32"))
    backbone = RegionTransformer(in_chans=6, grid_size=4, embed_dim=12, depth=1, num_heads=2)
    dataset = {"name": "RegionFeatures", "root": str(tmp_path), "transform": {"name": "RegionMultiCrop"}}
    notes, _ = gallery_of(tmp_path / "run", dataset, backbone)
    assert not {"no_map", "no_attention"} & set(notes)


def test_training_images_are_shown_without_their_augmentation(folder: Path) -> None:
    steps = [{"RandomResizedCrop": {"size": 12}}, {"RandomHorizontalFlip": {}}, {"ColorJitter": {}}, {"ToTensor": {}}]
    spec = {"name": "ImageFolder", "root": f"{folder}/train", "transform": [*steps, {"RandomErasing": {"prob": 1}}]}
    dataset = dataset_of({"DataLoader": {"Train": {"dataset": spec}}})
    one, other = (dataset.content(0, np.random.default_rng(seed))["image"] for seed in (1, 2))
    assert one.shape == (3, 12, 12)
    np.testing.assert_array_equal(one, other)


# --- pages about given folders ---------------------------------------------------------------------------------------


def write_run(folder: Path, accuracy: float, name: str = "LinearProbe") -> Path:
    file = MetricsFile(folder / name / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write(
            step, {"phase": "train", "epoch": step, "loss": 4.0 - step, "lr": 0.1, "batch_cost": 2.0, "ips": 8.0}
        )
        file.write(step, {"phase": "eval", "epoch": step, "top1": accuracy + step * (step < 3)})
    (folder / name / "config.yaml").write_text("Model: {name: <b>bold</b>}\n")
    return folder / name


def test_runs_stand_beside_each_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 50.0), write_run(tmp_path / "b", 60.0)]
    visualize_main(["report", *map(str, runs), "--out", str(tmp_path / "page/both.html"), "--title", "A & B"])
    page = (tmp_path / "page/both.html").read_text()
    assert "<h1>A &amp; B</h1>" in page
    assert ">a/LinearProbe</th>" in page
    assert ">b/LinearProbe</th>" in page
    assert "50.00 (best 52.00, epoch 2)" in page
    assert "60.00 (best 62.00, epoch 2)" in page
    assert ">0:00:06</td>" in page  # three steps of two seconds
    assert "&lt;b&gt;bold" in page
    assert "<b>bold" not in page


def test_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match="no such folder"):
        write_report([tmp_path / "missing"], tmp_path / "x.html")
    write_run(tmp_path / "out", 1.0)
    with pytest.raises(SystemExit) as ended:
        visualize_main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "x.html")])
    assert ended.value.code == 1
    assert f"did you mean {tmp_path / 'out/LinearProbe'}?" in capsys.readouterr().err
    (tmp_path / "out/LinearProbe/eval.json").write_text("{")
    with pytest.raises(ReportError, match=r"eval.json: damaged"):
        write_report([tmp_path / "out/LinearProbe"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_damaged_and_endless_numbers_are_shown_as_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path, 50.0)
    rows = [
        {"step": 4, "phase": "train", "epoch": 4, "loss": float("nan"), "lr": "?", "batch_cost": float("nan")},
        {"step": 4, "phase": "eval", "epoch": 4, "top1": float("nan"), "loss": None, "early_stopping_counter": 1},
        {"step": 5, "phase": "eval", "epoch": 5, "top1": float("nan"), "early_stopping_counter": 0},
        {"step": None, "phase": "train", "loss": 1.0},
    ]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode() + b'\xff\xfe\x00\n{"step": 6, "pha')
    page = write_report([run], tmp_path / "x.html").read_text()
    assert "nan (best 52.00, epoch 2)" in page
    assert ">0:00:06</td>" in page
    assert "early_stopping" not in page


def test_a_run_at_its_start_has_no_timings(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").write(0, {"phase": "train", "epoch": 0, "loss": 1.0, "batch_cost": 1.0})
    page = write_report([tmp_path], tmp_path / "x.html").read_text()
    assert "Timings" not in page
    assert "Configuration" not in page


def test_a_run_that_began_elsewhere_counts_its_own_steps(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1001, 1002, 1003):
        file.write(step, {"phase": "train", "epoch": 2, "loss": 1.0, "batch_cost": 2.0, "ips": 8.0})
    assert ">0:00:06</td>" in write_report([tmp_path], tmp_path / "x.html").read_text()


def test_a_table_of_many_runs_is_turned(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, float(number), f"run{number}") for number in range(8)]
    page = write_report(runs, tmp_path / "x.html").read_text()
    assert '<tr><th></th><th class="number">top1</th></tr>' in page
    assert '<td>run7</td><td class="number">7.00 (best 9.00, epoch 2)</td>' in page
    assert "<h1>8 runs</h1>" in page


def test_a_folder_that_is_given_twice_is_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, 50.0)
    page = write_report([run, run / ".." / run.name], tmp_path / "x.html").read_text()
    assert page.count("<h2>Curves") == 1
    assert '<th></th><th class="number">LinearProbe</th></tr>' in page


@pytest.mark.parametrize("value", [0, -1])
def test_settings_are_checked(folder: Path, value: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train_main(["-c", str(folder / "pretrain.yaml"), "-o", f"Global.report={{points: {value}}}"])
    assert ended.value.code == 2
    assert f"Global.report: points ({value}) must be at least 1" in capsys.readouterr().err
