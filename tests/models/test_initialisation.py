"""The statistics of fresh weights against those of the official initialisation."""

import json
import re

import numpy as np
import paddle
import pytest

from passl.models import DINOHead, VisionTransformer
from passl.registry import BACKBONES


def built(tag: str):
    """The layer a tag such as vit_tiny16 or head_192_4096 stands for, or None."""
    match = re.fullmatch(r"(vit_[a-z]+)(\d+)", tag)
    if match:
        return BACKBONES.get(match[1])(patch_size=int(match[2]))
    match = re.fullmatch(r"head_(\d+)_(\d+)", tag)
    return DINOHead(int(match[1]), int(match[2])) if match else None


def test_initialisation(reference):
    path = reference / "init_stats.json"
    if not path.exists():
        pytest.skip("this recording has no init_stats.json")
    recorded = json.loads(path.read_text())
    paddle.seed(0)
    checked = 0
    for tag in sorted({key.split(".")[0] for key in recorded}):
        layer = built(tag)
        for name, parameter in layer.state_dict().items() if layer else ():
            stats = recorded[f"{tag}.{name}"]
            value = parameter.numpy()
            # The standard error of a standard deviation is std/sqrt(2n); both sides are samples.
            error = 5.0 * stats["std"] / np.sqrt(value.size) + 1e-12
            assert abs(value.std() - stats["std"]) <= error, f"{tag}.{name}: std {value.std()}, {stats['std']}"
            assert abs(value.mean() - stats["mean"]) <= 2 * error, f"{tag}.{name}: mean {value.mean()}, {stats['mean']}"
            if "patch_embed" in name or name.endswith("weight_v"):  # uniform: the bound itself
                assert np.isclose(np.abs(value).max(), stats["absmax"], rtol=0.05), name
            checked += 1
    assert checked


def test_init_std_is_that_of_the_blocks_alone():
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, init_std=0.125)
    for name, parameter in network.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            assert abs(float(parameter.std()) / 0.125 - 1) < 0.05, name
    assert abs(float(network.pos_embed.std()) / 0.02 - 1) < 0.15
