"""Files of weights for the tests of the converter, in PyTorch's layout and without PyTorch."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
from paddle import nn

from passl import checkpoint, registry
from passl.convert import convert, save_torch
from passl.convert.layout import COUNTER, slots
from passl.models import DINO, DINOHead, LinearProbe, RegionTransformer, ResNet, VisionTransformer, XCiT

vit = functools.partial(VisionTransformer, 16, 8, embed_dim=64, depth=2, num_heads=1)
dinov2 = functools.partial(vit, layer_scale=1.0, mask_token=True)
resnet = functools.partial(ResNet, (1, 2, 1, 1), bottleneck=False, width=4)
xcit = functools.partial(XCiT, 8, 3, 16, 2, 2)
region = functools.partial(RegionTransformer, 6, 4, 64, 2, 1)
head = functools.partial(DINOHead, in_dim=64, out_dim=10, hidden_dim=12, bottleneck_dim=8)
BACKBONES = {"vit": vit, "dinov2": dinov2, "resnet": resnet, "xcit": xcit, "region": region}


def state(layer: nn.Layer, seed: str = "") -> dict[str, np.ndarray]:
    """Random numbers under the names and in the shapes of the same network in PyTorch, counters included."""
    result: dict[str, np.ndarray] = {}
    for slot in slots(layer):
        name = slot.torch_name
        generator = np.random.default_rng(zlib.crc32((seed + name).encode()))
        result[name] = (0.1 + generator.random(slot.torch_shape)).astype(np.float32)
        if name.endswith("running_var"):
            result[name[: -len("running_var")] + COUNTER] = np.array(generator.integers(1, 1 << 40))
    return result


def prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in tensors.items()}


def classifier(in_dim: int, num_classes: int = 3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(in_dim)
    weight = generator.standard_normal((num_classes, in_dim)).astype(np.float32)
    return {"weight": weight, "bias": weight[:, 0].copy()}


def assert_same_tensors(found: dict, expected: dict, in_order: bool = True) -> None:
    """Equal names, types, shapes and bits."""
    assert list(found) == list(expected) if in_order else set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


def converted(path, **options):
    return convert(path, None, **options).conversion


def save(tensors, folder, name="weights.pth"):
    save_torch(tensors, folder / name)
    return folder / name


def build(section):
    """The backbone or head of a section of a configuration, not yet built."""
    arguments = dict(section)
    name = arguments.pop("name")
    table = registry.BACKBONES if name in registry.BACKBONES else registry.HEADS
    return functools.partial(table.get(name), **arguments)


def loaded(conversion):
    """The Layer that the section of a converted file describes, with its weights."""
    section = dict(conversion.model)
    if conversion.kind == "backbone":
        layer = build(section)()
    else:
        parts = {key: build(section.pop(key)) for key in ("backbone", "head") if key in section}
        layer = {"DINO": DINO, "LinearProbe": LinearProbe}[section.pop("name")](**parts, **section)
    checkpoint.load_weights(layer, conversion.state)
    layer.eval()
    return layer


def assert_holds(conversion, expected, prefix=""):
    """The state below ``prefix`` is ``expected``, which is in PyTorch's layout and has counters."""
    part = [slot for slot in conversion.layout if slot.name.startswith(prefix)]
    found = {slot.torch_name[len(prefix) :]: slot.to_torch(conversion.state[slot.name]) for slot in part}
    assert_same_tensors(found, {name: value for name, value in expected.items() if value.ndim}, in_order=False)
    counters = {name: int(value) for name, value in expected.items() if not value.ndim}
    kept = {k[len(prefix) :]: v for k, v in conversion.counters.items() if k.startswith(prefix)}
    assert kept == counters


def run_state(backbone="vit", **options):
    """student, teacher and centre of a run, under their bare names."""
    networks = {}
    for network in ("student", "teacher"):
        layer, top = BACKBONES[backbone](), head(**options)
        networks[network] = {
            **prefixed("backbone.", state(layer, f"{network}.")),
            **prefixed("head.", state(top, f"{network}.")),
        }
    return {**networks, "dino_loss": {"center": np.full((1, 10), 0.5, np.float32)}}
