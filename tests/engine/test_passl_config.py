"""The configurations that PASSL publishes run unchanged."""

from __future__ import annotations

import shutil

import pytest

from passl import checkpoint
from passl.config import ConfigError, load
from passl.convert import convert, save_torch
from passl.convert.layout import slots
from passl.engine.passl_config import translate
from passl.engine.run import checked
from passl.registry import BACKBONES
from tests.engine import tiny

# Written from PASSL's description of its keys; {numbers} are what its four files differ in.
CONFIG = """
Global:
  task_type: Classification
  train_loop: ClassificationTrainingEpochLoop
  validate_loop: ClassificationEvaluationLoop
  checkpoint: null
  pretrained_model: null
  output_dir: ./output/
  device: gpu
  save_interval: 2
  max_num_latest_checkpoint: 0
  eval_during_train: True
  eval_interval: 2
  eval_unit: "epoch"
  accum_steps: 1
  epochs: 100
  print_batch_step: 100
  use_visualdl: False
  seed: 2023
FP16:
  level: O1
DistributedStrategy:
  data_parallel: True
Model:
  name: {name}_linearprobe
  backbone:
    type: {name}
    patch_size: {patch}
    output_dim: 0
    n_last_blocks: {blocks}
    avgpool_patchtokens: {avgpool}
  {classes}: 1000
Loss:
  Train:
    - CELoss:
        weight: 1.0
  Eval:
    - CELoss:
        weight: 1.0
LRScheduler:
    name: TimmCosine
    learning_rate: {lr}
    decay_unit: epoch
    last_epoch: 0
    warmup_epoch: 0
Optimizer:
  name: Momentum
  momentum: 0.9
  weight_decay: 0.0
DataLoader:
  Train:
    dataset:
      name: ImageFolder
      root: ./dataset/ILSVRC2012/train
      transform:
        - RandomResizedCrop:
            size: 224
        - RandomHorizontalFlip:
        - ToTensor:
        - Normalize:
            mean: [0.485, 0.456, 0.406]
            std: [0.229, 0.224, 0.225]
    sampler:
      name: DistributedBatchSampler
      batch_size: {batch}
      drop_last: False
      shuffle: True
    loader:
      num_workers: 8
      use_shared_memory: True
  Eval:
    dataset:
      name: ImageFolder
      root: ./dataset/ILSVRC2012/val
      transform:
        - Resize:
            size: 256
            interpolation: bicubic
        - CenterCrop:
            size: 224
        - ToTensor:
        - Normalize:
            mean: [0.485, 0.456, 0.406]
            std: [0.229, 0.224, 0.225]
    sampler:
      name: DistributedBatchSampler
      batch_size: 32
      drop_last: False
      shuffle: False
    loader:
      num_workers: 8
      use_shared_memory: True
Metric:
  Train:
    - TopkAcc:
        topk: [1, 5]
  Eval:
    - TopkAcc:
        topk: [1, 5]
Export:
  export_type: paddle
  input_shape: [None, 3, 224, 224]
"""
SMALL = {"blocks": 4, "avgpool": "False", "lr": 0.001, "batch": 32}
BASE = {"blocks": 1, "avgpool": "True", "lr": 0.003, "batch": 96}
FILES = {
    "s16": {"name": "dino_deit_small16", "patch": 16, "classes": "num_classes", **SMALL},
    "s8": {"name": "dino_deit_small8", "patch": 8, "classes": "class_num", **SMALL},
    "b16": {"name": "dino_vit_base16", "patch": 16, "classes": "class_num", **BASE},
    "b8": {"name": "dino_vit_base8", "patch": 8, "classes": "class_num", **BASE},
}


def write(folder, key):
    path = folder / f"{key}.yaml"
    path.write_text(CONFIG.format(**FILES[key]))
    return path


@pytest.mark.parametrize("key", FILES)
def test_published_files_are_read(tmp_path, key):
    config = checked(load(write(tmp_path, key)), training=True)
    values = FILES[key]
    size = "small" if "small" in values["name"] else "base"
    assert config["Model"] == {
        "name": "LinearProbe",
        "backbone": {"name": f"vit_{size}", "patch_size": values["patch"]},
        "num_classes": 1000,
        "n_last_blocks": values["blocks"],
        "avgpool": values["avgpool"] == "True",
    }
    assert config["Schedules"]["lr"]["learning_rate"] == values["lr"]
    assert config["Global"]["name"] == f"{values['name']}_linearprobe"


def test_every_wrong_key_is_named(tmp_path):
    wrong = [
        "Model.backbone.type=dino_vit_base16",
        "Model.depth=3",
        "Loss.Train.0.CELoss.weight=0.5",
        "Global.train_loop=X",
        "Optimizer.momentm=0.9",
    ]
    with pytest.raises(ConfigError) as found:
        checked(load(write(tmp_path, "s16"), wrong), training=True)
    for text in ("Model.backbone.type", "Model.depth", "Loss.Train", "Global.train_loop", "Optimizer.momentm"):
        assert text in str(found.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("LRScheduler=null", "-o: LRScheduler: is required"),
        ("LRScheduler.learning_rat=1", "-o: LRScheduler.learning_rat: "),
        ("LRScheduler.learning_rate=fast", "-o: LRScheduler.learning_rate: expected float, got 'fast'"),
        ("LRScheduler.name=TimmCosin", "-o: LRScheduler.name: unknown schedule 'TimmCosin'"),
        ("LRScheduler.timeline=1", "-o: LRScheduler.timeline: "),
        ("Schedules.lr.name=Constant", "-o: Schedules: PASSL's form has LRScheduler, not Schedules"),
        ("Model.class_num=3", "Model.num_classes: Model.class_num says the same: give only one of them"),
        ("Model.num_classes=many", "-o: Model.num_classes: expected int, got 'many'"),
        ("Model.backbone.n_last_blocks=all", "-o: Model.n_last_blocks: expected int, got 'all'"),
    ],
)
def test_what_is_wrong_is_named_as_it_was_given(tmp_path, override, message):
    with pytest.raises(ConfigError) as found:
        checked(load(write(tmp_path, "s16"), [override]), training=True)
    assert len(found.value.problems) == 1
    assert message in found.value.problems[0]


def test_a_wrong_schedule_in_the_file_is_named_with_it(tmp_path):
    path = write(tmp_path, "b8")
    path.write_text(path.read_text().replace("    warmup_epoch:", "    warmup_epochs:"))
    with pytest.raises(ConfigError) as found:
        checked(load(path), training=True)
    (problem,) = found.value.problems
    assert problem.startswith(f"{path}: LRScheduler.warmup_epochs: ")


def test_only_training_needs_a_schedule(tmp_path):
    _, problems = translate(load(write(tmp_path, "s16"), ["LRScheduler=null"]), training=False)
    assert not problems


def test_the_number_of_classes_has_two_names_and_a_default(tmp_path):
    for overrides, expected in (
        (["Model.num_classes=null", "Model.class_num=7"], 7),
        (["Model.num_classes=null"], 1000),
    ):
        config, problems = translate(load(write(tmp_path, "s16"), overrides))
        assert (config["Model"]["num_classes"], problems) == (expected, [])


@pytest.mark.parametrize("key", ["Global", "Model.backbone", "DataLoader", "DataLoader.Train", "Loss", "Metric.Eval"])
def test_a_section_that_is_none_is_named(tmp_path, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        checked(load(write(tmp_path, "s16"), [f"{key}=text"]), training=True)


@pytest.mark.parametrize("key", [pytest.param(key, marks=[] if key == "s16" else pytest.mark.slow) for key in FILES])
def test_published_files_train_from_an_official_file_at_a_prefix(tmp_path, reference, key):
    """As PASSL's README has it: its overrides, a converted prefix, images in two class folders."""
    pictures = sorted((reference / "aug_images").glob("*.jpg"))[:8]
    for number, picture in enumerate(pictures):
        for split in ("train", "val"):
            target = tmp_path / split / f"class{number % 2}" / picture.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target)
    model = checked(load(write(tmp_path, key)), training=True)["Model"]["backbone"]
    network = BACKBONES.get(model["name"])(patch_size=model["patch_size"])
    values = network.state_dict()
    save_torch({s.torch_name: s.to_torch(values[s.name].numpy()) for s in slots(network)}, tmp_path / "official.pth")
    convert(tmp_path / "official.pth", tmp_path / "pretrained/dino/official")
    (tmp_path / "official.pth").unlink()
    steps = 3 if key == "s16" else 21
    published = tiny.overrides(
        Global__print_batch_step=20,
        Global__max_train_step=steps,
        Global__flags__FLAGS_cudnn_deterministic=1,
        Global__pretrained_model=tmp_path / "pretrained/dino/official",
    )
    ours = tiny.overrides(
        Global__device="cpu",
        FP16__level="O0",
        Global__output_dir=tmp_path / "out",
        DataLoader__Train__dataset__root=tmp_path / "train",
        DataLoader__Eval__dataset__root=tmp_path / "val",
        DataLoader__Train__sampler__batch_size=2,
        DataLoader__Train__loader__num_workers=1,
        DataLoader__Eval__loader__num_workers=1,
    )
    done = tiny.run(tiny.TRAIN, "-c", tmp_path / f"{key}.yaml", *published, *ours)
    assert done.returncode == 0, done.stderr
    assert "150 of 150 keys matched" in done.stderr
    assert "[best metric: " in done.stderr
    name = FILES[key]["name"]
    assert checkpoint.read_states(tmp_path / f"out/{name}_linearprobe/latest")["step"] == steps
