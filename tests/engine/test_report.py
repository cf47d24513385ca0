"""``report.html``, and what VisualDL gets of it: read back, and looked at in a browser where there is one."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from visualdl import LogReader

from passl.cli import eval_main, train_main, visualize_main
from passl.engine.report import ReportError, write_report
from passl.log import MetricsFile
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


# --- pages about given folders ---------------------------------------------------------------------------------------


def write_run(folder: Path, accuracy: float, name: str = "LinearProbe") -> Path:
    file = MetricsFile(folder / name / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write(
            step, {"phase": "train", "epoch": step, "loss": 4.0 - step, "lr": 0.1, "batch_cost": 2.0, "ips": 8.0}
        )
        file.write(step, {"phase": "eval", "epoch": step, "top1": accuracy + step * (step < 3), "seconds": 0.5})
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


@pytest.mark.parametrize("value", [0, -1])
def test_settings_are_checked(folder: Path, value: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train_main(["-c", str(folder / "pretrain.yaml"), "-o", f"Global.report={{points: {value}}}"])
    assert ended.value.code == 2
    assert f"Global.report: points ({value}) must be at least 1" in capsys.readouterr().err
