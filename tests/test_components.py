"""Everything that is registered is built and run at a tiny size, and every recipe is checked: by being there."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

import passl.engine.settings
from passl.cli import train_main
from passl.config import load
from passl.data.tar_index import index_tarball
from passl.engine.run import checked
from passl.models import DINOHead, VisionTransformer
from passl.models.method import Method
from passl.models.vision_transformer import TokenTransformer
from passl.registry import BACKBONES, DATASETS, EVALUATORS, HEADS, METHODS, OPTIMIZERS, SCHEDULES, TRANSFORMS
from passl.schedules import Timeline
from tests.data.tarballs import write_tarball
from tests.engine import tiny
from tests.evaluators import made_sets

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3, "in_dim": 12}
SMALL.update(n_last_blocks=2, depths=(1, 1, 1, 1), width=4, grid_size=2, in_chans=3)
SMALL.update(out_dim=10, hidden_dim=8, bottleneck_dim=6, value=0.1, base=0.1, learning_rate=0.1, size=16)
SMALL.update(global_crops_size=16, local_crops_size=8, num_local_crops=2)

pytestmark = pytest.mark.smoke


def build(builder, **special):
    """`builder` with tiny sizes wherever it takes a size."""
    names = inspect.signature(builder).parameters
    return builder(**{name: value for name, value in {**SMALL, **special}.items() if name in names})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components")
    tiny.write_images(folder, size=16)
    for path in sorted((folder / "train").rglob("*.png")):
        target = folder / "train-RegionFeatures" / path.relative_to(folder / "train").with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, np.ones((4, SMALL["embed_dim"]), np.float32))
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in (folder / "train").rglob("*.png")}
    write_tarball(folder / "train/pretrain_dataset.tar", files)
    index_tarball(folder / "train/pretrain_dataset.tar", folder / "train")
    made_sets.write_all(folder / "benchmarks")
    return folder


def parts():
    backbone = functools.partial(VisionTransformer, 16, 8, 3, 12, 2, 2, mask_token=True)
    return {"backbone": backbone, "head": functools.partial(DINOHead, out_dim=10, hidden_dim=8, bottleneck_dim=6)}


def batch():
    paddle.seed(0)
    crops = {"global_crops": paddle.randn([4, 3, 16, 16]), "local_crops": paddle.randn([4, 3, 8, 8])}
    return {
        **crops,
        "image": paddle.randn([2, 3, 16, 16]),
        "label": paddle.to_tensor([0, 2]),
        "masks": paddle.to_tensor(np.arange(16).reshape(4, 4) % 3 == 0),
        "index": paddle.arange(2),
    }


@pytest.mark.parametrize("name", BACKBONES.names())
def test_backbones(name, monkeypatch):
    whole = TokenTransformer._build
    # Two of their equal blocks: all forty of the largest would fill gigabytes.
    monkeypatch.setattr(TokenTransformer, "_build", lambda self, *sizes: whole(self, *sizes[:2], 2, *sizes[3:]))
    backbone = build(BACKBONES.get(name), num_classes=0)
    # Not two: at this size a deep convnet would normalise over just those, and its gradients overflow.
    images = paddle.randn([8, 3, 16, 16])
    images.stop_gradient = False
    output = backbone(images)
    assert list(output.shape) == [8, backbone.embed_dim]
    output.sum().backward()
    assert all(np.isfinite(p.grad.numpy()).all() for p in backbone.parameters() if not p.stop_gradient)


@pytest.mark.parametrize("name", HEADS.names())
def test_heads(name):
    head = build(HEADS.get(name))
    output = head(paddle.randn([4, 12]))
    assert list(output.shape) == [4, 10]
    output.square().sum().backward()
    assert all(p.grad is not None for p in head.parameters() if not p.stop_gradient)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS.names())
@pytest.mark.parametrize("name", METHODS.names())
def test_methods_with_every_optimizer(name, optimizer_name):
    method = build(METHODS.get(name), **parts())
    assert isinstance(method, Method)
    method.train()
    for key, parameter in method.named_parameters():
        parameter.name = key
    optimizer = OPTIMIZERS.get(optimizer_name)(method.param_groups(), clip_norm=1.0)
    before = [p.numpy().copy() for p in optimizer.parameters]
    for _ in range(2):
        values = {"teacher_temp": 0.04} if "teacher_temp" in inspect.signature(method.forward).parameters else {}
        method(batch(), **values)["loss"].backward()
        optimizer.set(0.01, 0.1)
        optimizer.clip_gradients()
        method.after_backward(epoch=5)
        optimizer.step()
        optimizer.clear_grad()
    assert any((p.numpy() != old).any() for p, old in zip(optimizer.parameters, before))
    state = {key: np.asarray(value) for key, value in optimizer.state_dict().items()}
    optimizer.load_state_dict(state)
    assert {key: np.asarray(value).tobytes() for key, value in optimizer.state_dict().items()} == {
        key: value.tobytes() for key, value in state.items()
    }


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_schedules(name):
    schedule = build(SCHEDULES.get(name), timeline=Timeline(10, 5))
    assert all(np.isfinite(schedule(step)) for step in range(10))


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_transforms(name):
    transform = build(TRANSFORMS.get(name))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8))
    takes_array = name in ("Normalize", "RandomErasing", "RegionMultiCrop")
    data = np.arange(3 * 20 * 24, dtype=np.float32).reshape(3, 20, 24) if takes_array else image
    one, same = (transform(data, np.random.default_rng(5)) for _ in range(2))
    if isinstance(one, dict):
        assert all((one[key] == same[key]).all() for key in one)
    else:
        assert (np.asarray(one) == np.asarray(same)).all()


@pytest.mark.parametrize("name", DATASETS.names())
def test_datasets(name, images):
    own = images / f"train-{name}"  # for those that read other files than images
    dataset = build(DATASETS.get(name), root=str(own if own.exists() else images / "train"))
    assert len(dataset) == 15
    assert dataset.sample(3, np.random.default_rng(0))["index"] == 3


@pytest.mark.parametrize("name", EVALUATORS.names())
def test_evaluators(name, images, tmp_path):
    transform = TRANSFORMS.get("ToTensor")()
    folders = {split: DATASETS.get("ImageFolder")(str(images / split), transform) for split in ("train", "val")}
    evaluator = build(
        EVALUATORS.get(name),
        dataset=folders["val"],
        train_dataset=folders["train"],
        val_dataset=folders["val"],
        root=str(images / "benchmarks" / name),
        image_size=64,
    )
    method = build(METHODS.get("LinearProbe"), **parts())
    results = passl.evaluators.evaluate(evaluator, method, tmp_path)
    assert evaluator.key_metric in results
    assert all(np.isfinite(value) for value in results.values())


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes(path):
    if "_base_" in path.parts:
        train_main(["-c", str(path), "--check"])  # a piece of a recipe: it may be partial, not wrong
        return
    is_trained = "Optimizer" in load(path)
    checked(load(path), training=is_trained)
    assert path.read_text(encoding="utf-8").startswith("# "), "a recipe begins with what it is and how to run it"
