"""From images of other channels to predictions: stats, pre-training, k-NN, probe, export, predict, convert."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import tifffile

from passl import checkpoint, exported
from passl.cli import convert_main, data_main, eval_main, export_main, predict_main, train_main
from passl.config import load
from passl.models.channels import inflate

BACKBONE = "{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 12, depth: 1, num_heads: 2}"
VALIDATION = "[{Resize: {size: 18, interpolation: bicubic}}, {CenterCrop: {size: 16}}, {ToTensor: {}}, {Normalize: {}}]"
GLOBAL = "Global: {output_dir: FOLDER/out, device: cpu, epochs: 1, use_visualdl: false, print_batch_step: 1}"
KNN = f"""
Evaluators:
  - name: KNN
    k: [3]
    batch_size: 5
    train_dataset: &images {{name: ImageFolder, root: FOLDER/images, transform: {VALIDATION}}}
    val_dataset: *images
"""
PRETRAIN = f"""
_base_: stats.yaml
{GLOBAL}
Model: {{name: DINO, backbone: {BACKBONE}, head: {{name: DINOHead, out_dim: 8, hidden_dim: 8, bottleneck_dim: 4}}}}
Schedules:
  lr: {{name: Constant, value: 1e-3}}
  weight_decay: {{name: Constant, value: 0.04}}
  teacher_momentum: {{name: Constant, value: 0.99}}
  teacher_temp: {{name: Constant, value: 0.04}}
Optimizer: {{name: AdamW}}
DataLoader:
  Train:
    dataset:
      name: ImageFolder
      root: FOLDER/images
      transform: {{name: MultiCrop, global_crops_size: 16, local_crops_size: 8, num_local_crops: 2, hue: 0.3}}
    sampler: {{batch_size: 4}}
    loader: {{num_workers: 0}}
{KNN}
"""
EVALUATE = f"{GLOBAL}\nModel: {BACKBONE}\n{KNN}"
PROBE = f"""
{GLOBAL}
Model: {{name: LinearProbe, backbone: {BACKBONE}, num_classes: 2, n_last_blocks: 1}}
Schedules: {{lr: {{name: Constant, value: 0.1}}}}
Optimizer: {{name: Momentum}}
DataLoader:
  Train:
    dataset:
      name: ImageFolder
      root: FOLDER/images
      transform:
        [{{RandomResizedCrop: {{size: 16}}}}, {{RandomHorizontalFlip: {{}}}}, {{ToTensor: {{}}}}, {{Normalize: {{}}}}]
    sampler: {{batch_size: 4}}
    loader: {{num_workers: 0}}
  Eval:
    dataset: {{name: ImageFolder, root: FOLDER/images, transform: {VALIDATION}}}
    sampler: {{batch_size: 4}}
    loader: {{num_workers: 0}}
"""


def write(kind: str, path: str, array: np.ndarray) -> None:
    """`array` [H, W, C] in 0..1"""
    if kind == "grey png of 16 bits":
        cv2.imwrite(f"{path}.png", (array * 65535).astype(np.uint16))
    elif kind == "arrays of five floats":
        np.save(f"{path}.npy", (array * 20 - 7).astype(np.float32))
    elif kind == "tiff of four bytes":
        bytes_ = (array * 255).astype(np.uint8)
        tifffile.imwrite(f"{path}.tif", bytes_, photometric="minisblack", planarconfig="contig")
    else:
        tifffile.imwrite(f"{path}.tif", (array * 65535).astype(np.uint16), photometric="rgb")


@pytest.fixture(scope="module", autouse=True)
def logging_as_before() -> Iterator[None]:
    """The commands run in this process, and send its log elsewhere."""
    logger = logging.getLogger("passl")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


KINDS = {"grey png of 16 bits": 1, "arrays of five floats": 5, "tiff of four bytes": 4, "rgb tiff of 16 bits": 3}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """(folder, channels) of a pre-training run with the statistics of its images; the folder has images/{a,b}."""
    folder, channels = tmp_path_factory.mktemp("channels"), KINDS[request.param]
    rng = np.random.default_rng(0)
    for label in "ab":
        (folder / "images" / label).mkdir(parents=True)
        for number in range(6):
            height, width = rng.integers(18, 30, 2)
            array = rng.random((height, width, channels)) * 0.6 + 0.4 * (label == "b")
            write(request.param, str(folder / "images" / label / f"{number}"), array)
    for name, text in (("pretrain", PRETRAIN), ("evaluate", EVALUATE), ("probe", PROBE)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    data_main(["stats", str(folder / "images"), "--out", str(folder / "stats.yaml")])
    train_main(["-c", str(folder / "pretrain.yaml")])
    return folder, channels


def test_the_run_keeps_its_section(run):
    folder, channels = run
    section = load(folder / "stats.yaml")["Data"]
    assert section["channels"] == channels
    assert load(folder / "out/DINO/config.yaml")["Data"] == section
    weights = checkpoint.read_weights(folder / "out/DINO/latest")
    assert weights["teacher.backbone.patch_embed.proj.weight"].shape == (12, channels, 8, 8)
    log = (folder / "out/DINO/train.log").read_text()
    assert "knn_top1_k3: 100.0" in log


def test_what_starts_from_it_takes_the_section(run):
    folder, channels = run
    start = ["-o", f"Global.pretrained_model={folder}/out/DINO/latest"]
    eval_main(["-c", str(folder / "evaluate.yaml"), *start])
    found = json.loads((folder / "out/VisionTransformer/eval.json").read_text())
    assert found["knn_top1_k3"] == 100.0
    train_main(["-c", str(folder / "probe.yaml"), *start])
    assert load(folder / "out/LinearProbe/config.yaml")["Data"] == load(folder / "stats.yaml")["Data"]
    # A probe of the run hands it on.
    probe = f"Global.pretrained_model={folder}/out/LinearProbe/latest"
    eval_main(["-c", str(folder / "probe.yaml"), "-o", probe])
    export_main(["-c", str(folder / "probe.yaml"), "-o", probe, "--out", str(folder / "probe.passl")])
    network = exported.ExportedNetwork(folder / "probe.passl", "cpu")
    assert network.meta.channels == channels
    assert network.meta.input_shape == [None, channels, 16, 16]


def test_exported_networks_read_the_same_images(run, capsys):
    folder, _ = run
    out = folder / "bank.passl"
    export_main(
        ["-c", str(folder / "evaluate.yaml"), "-o", f"Global.pretrained_model={folder}/out/DINO/latest"]
        + ["--knn-bank", str(folder / "images"), "--k", "1", "--out", str(out)]
    )
    meta = exported.ExportedNetwork(out, "cpu").meta
    section = load(folder / "stats.yaml")["Data"]
    assert meta.preprocessing[-1] == {"Normalize": {"mean": section["mean"], "std": section["std"]}}
    capsys.readouterr()
    predict_main([str(out), str(folder / "images"), "--output", "-", "--topk", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12
    for line in lines:
        assert f"/{line['classes'][0]['class']}/" in line["path"]
    # A backbone by its name has the section too, and no transform of a configuration.
    arguments = [f"--set={part}" for part in BACKBONE[1:-1].replace(": ", "=").split(", ")[1:]]
    plain = [
        "--pretrained-model",
        str(folder / "out/DINO/latest"),
        "--image-size",
        "16",
        "--out",
        str(folder / "f.passl"),
    ]
    export_main(["--arch", "VisionTransformer", *arguments, *plain])
    assert exported.ExportedNetwork(folder / "f.passl", "cpu").meta.preprocessing[-1] == meta.preprocessing[-1]


def test_pictures_of_another_kind_are_left_out(run, capsys):
    folder, channels = run
    other = folder / "other"
    other.mkdir(exist_ok=True)
    np.save(other / "two.npy", np.zeros((20, 20, 2)))
    if not (folder / "f.passl").exists():
        pytest.skip("the export above failed")
    with pytest.raises(SystemExit):
        predict_main([str(folder / "f.passl"), str(other), "--features", str(folder / "features.npy")])
    assert f"has 2 channels (an array [20, 20, 2]), and Data.channels is {channels}" in capsys.readouterr().err


def test_converted_weights_keep_the_section(run):
    folder, _ = run
    section = load(folder / "stats.yaml")["Data"]
    latest, heads = str(folder / "out/DINO/latest"), ["--set", "num_heads=2"]
    convert_main([latest, str(folder / "whole.pth"), "--to", "torch"])
    convert_main([str(folder / "whole.pth"), str(folder / "back"), *heads])
    convert_main([latest, str(folder / "teacher"), "--checkpoint-key", "teacher", *heads])
    for prefix in ("back", "teacher"):
        eval_main(["-c", str(folder / "evaluate.yaml"), "-o", f"Global.pretrained_model={folder / prefix}"])
        kept = load(folder / "out/VisionTransformer/eval_config.yaml")["Data"]
        assert kept == section


def test_weights_for_rgb_are_inflated(run, capsys):
    folder, channels = run
    if channels == 3:
        pytest.skip("these are RGB")
    rgb = folder / "rgb"
    for label in "ab":
        (rgb / "images" / label).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            cv2.imwrite(f"{rgb}/images/{label}/{number}.png", np.full((20, 20, 3), 50 * number, np.uint8))
    (rgb / "pretrain.yaml").write_text(PRETRAIN.replace("FOLDER", str(rgb)).replace("_base_: stats.yaml", ""))
    train_main(["-c", str(rgb / "pretrain.yaml"), "-o", "Evaluators=null"])
    convert_main([f"{rgb}/out/DINO/latest", f"{rgb}/teacher.pth", "--to", "torch", "--checkpoint-key", "teacher"])
    weights = checkpoint.read_weights(rgb / "out/DINO/latest")
    for source in ("out/DINO/latest", "teacher.pth"):
        changes = {"pretrained_model": rgb / source, "max_train_step": 1, "output_dir": folder / "inflated"}
        overrides = [part for key, value in changes.items() for part in ("-o", f"Global.{key}={value}")]
        train_main(["-c", str(folder / "pretrain.yaml"), *overrides, "-o", "Schedules.lr.value=0.0"])
        name = "student.backbone.patch_embed.proj.weight"
        expected = inflate(
            weights[name.replace("student", "teacher" if source.endswith("pth") else "student")], channels
        )
        found = checkpoint.read_weights(folder / "inflated/DINO/latest")
        np.testing.assert_allclose(found[name], expected, atol=1e-7)
        log = (folder / "inflated/DINO/train.log").read_text()
        shown = capsys.readouterr()
        assert f"inflated from RGB to in_chans {channels}" in log + shown.out + shown.err
