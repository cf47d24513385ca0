"""Weights for RGB in networks for other channels."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.models.channels import inflate, inflate_state
from passl.registry import BACKBONES

TINY = {
    "VisionTransformer": {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2},
    "ResNet": {"depths": [1, 1, 1, 1], "bottleneck": False, "width": 4},
    "XCiT": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
}
FIRST = {
    "VisionTransformer": "patch_embed.proj.weight",
    "ResNet": "conv1.weight",
    "XCiT": "patch_embed.proj.0.0.weight",
}
# What every registered backbone calls the convolution that sees the image, the region transformer's apart.
LIGHT = ("vit_tiny", "dinov2_vit_small", "resnet18", "xcit_nano_12_p8")


@pytest.mark.smoke
@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 5, 6, 13])
def test_rule(in_chans):
    weight = np.random.default_rng(0).standard_normal((7, 3, 4, 5)).astype(np.float32)
    found = inflate(weight, in_chans)
    assert found.shape == (7, in_chans, 4, 5)
    assert found.dtype == np.float32
    if in_chans == 1:
        expected = weight[:, :1] + weight[:, 1:2] + weight[:, 2:]
    else:
        expected = np.stack([weight[:, channel % 3] * (3 / in_chans) for channel in range(in_chans)], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("in_chans", [1, 6])
def test_equal_channels_have_the_response_of_grey_pictures(name, in_chans):
    build = BACKBONES.get(name)
    rgb, other = build(**TINY[name]), build(**TINY[name], in_chans=in_chans)
    state = {key: value.numpy() for key, value in rgb.state_dict().items()}
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    state, done = inflate_state(state, shapes)
    how = "summed over RGB" if in_chans == 1 else "repeated cyclically, times 3/6"
    assert done == [f"{FIRST[name]} inflated from RGB to in_chans {in_chans} ({how})"]
    checkpoint.load_weights(other, state)
    rgb.eval()
    other.eval()
    grey = paddle.randn([2, 1, 16, 16])
    expected = rgb(grey.expand([-1, 3, -1, -1])).numpy()
    np.testing.assert_allclose(other(grey.expand([-1, in_chans, -1, -1])).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", LIGHT)
def test_every_family_takes_in_chans(name):
    with paddle.LazyGuard():
        shapes = {key: value.shape for key, value in BACKBONES.get(name)(in_chans=5).state_dict().items()}
        rgb = {key: value.shape for key, value in BACKBONES.get(name)().state_dict().items()}
    state = {key: np.zeros(shape, np.float32) for key, shape in rgb.items()}
    state, done = inflate_state(state, shapes)
    assert len(done) == 1
    assert {key: list(value.shape) for key, value in state.items()} == {k: list(v) for k, v in shapes.items()}


@pytest.mark.smoke
def test_nothing_else_is_changed():
    state = {
        "student.backbone.patch_embed.proj.weight": np.ones((4, 3, 2, 2)),
        "backbone.conv1.weight": np.ones((4, 3, 2, 2)),
        "layer1.0.conv1.weight": np.ones((4, 3, 2, 2)),
        "patch_embed.proj.weight": np.ones((4, 3, 2, 2)),
        "conv1.weight": np.ones((4, 2, 2, 2)),
    }
    shapes = {
        "student.backbone.patch_embed.proj.weight": [4, 5, 2, 2],
        "backbone.conv1.weight": [4, 3, 2, 2],
        "layer1.0.conv1.weight": [4, 5, 2, 2],  # not the first one
        "patch_embed.proj.weight": [4, 5, 3, 3],  # other patches too
        "conv1.weight": [4, 5, 2, 2],  # not from RGB
    }
    found, done = inflate_state(state, shapes)
    assert len(done) == 1
    changed = [name for name in state if found[name].shape != state[name].shape]
    assert changed == ["student.backbone.patch_embed.proj.weight"]
