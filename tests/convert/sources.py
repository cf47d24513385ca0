"""Files of weights for the tests of the converter, in PyTorch's layout and without PyTorch."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
from paddle import nn

from passl.convert.layout import COUNTER, slots
from passl.models import DINOHead, RegionTransformer, ResNet, VisionTransformer, XCiT

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
