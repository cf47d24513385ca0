"""Attention of [CLS] and features of patches, of any backbone and block."""

import re

import numpy as np
import paddle
import pytest
from paddle import nn

from passl.models import ResNet, VisionTransformer, XCiT
from passl.models.tokens import attention_rollout, cls_attention, patch_features
from tests.models.test_vision_transformer import images, recorded_model
from tests.models.weights import assert_close

pytestmark = pytest.mark.smoke


def vit(**more):
    paddle.seed(0)
    model = VisionTransformer(32, 8, 3, 24, 3, 3, init_std=0.2, **more)
    model.eval()
    return model


def a_batch(height=24, width=40):
    return paddle.to_tensor(np.random.default_rng(0).normal(size=[2, 3, height, width]).astype("float32"))


@pytest.mark.parametrize("patch_size", [16, 8])
def test_recorded_attention_and_features(reference, patch_size):
    recorded = np.load(reference / f"vit_p{patch_size}_io.npz")
    model = recorded_model(reference, patch_size, recorded)
    sizes = [key.split("/")[0] for key in recorded.files if key.endswith("/last_attention_cls_row")]
    assert sizes
    for size in sizes:
        x = images(recorded[f"{size}/input_u8"])
        expected = recorded[f"{size}/last_attention_cls_row"][:, :, 1:]
        grid = [side // patch_size for side in x.shape[2:]]
        assert_close(cls_attention(model, x), expected.reshape([*expected.shape[:2], *grid]), 1e-6, size)
        means = recorded[f"{size}/intermediate4_patchmean"]
        for layer in (-4, -1):
            features = patch_features(model, x, layer)
            assert features.shape[1:3] == grid
            assert_close(features.mean([1, 2]), means[layer], 2e-5, f"{size}, block {layer}")


@pytest.mark.parametrize("registers", [0, 4])
def test_any_block_and_registers(registers):
    model, x = vit(num_register_tokens=registers), a_batch()
    tokens = model.prepare_tokens(x)
    for index, block in enumerate(model.blocks):
        full = block.attn.weights(block.norm1(tokens)).numpy()
        expected = full[:, :, 0, 1 + registers :].reshape(2, 3, 3, 5)
        for layer in (index, index - 3):
            assert_close(cls_attention(model, x, layer), expected, 1e-6)
            norm = model.get_intermediate_layers(x, 3)[index][:, 1:]
            assert_close(patch_features(model, x, layer).reshape([2, 15, 24]), norm, 1e-5)
        tokens = block(tokens)


@pytest.mark.parametrize("layer", [-1, 1])
def test_rollout_is_the_row_of_the_product(monkeypatch, layer):
    monkeypatch.setattr("passl.models.tokens._ROWS_AT_ONCE", 5)  # does not divide the number of tokens
    model, x = vit(num_register_tokens=2), a_batch()
    tokens, product = model.prepare_tokens(x), np.eye(3 + 15)
    for block in model.blocks[: layer % 3 + 1]:
        mean = block.attn.weights(block.norm1(tokens)).numpy().astype(np.float64).mean(1)
        mixed = 0.5 * mean + 0.5 * np.eye(18)
        product = mixed / mixed.sum(-1, keepdims=True) @ product
        tokens = block(tokens)
    assert_close(attention_rollout(model, x, layer), product[:, 0, 3:].reshape(2, 3, 5), 1e-6)


def test_xcit_has_class_attention_and_features_of_every_block():
    paddle.seed(0)
    model = XCiT(8, 3, 24, 2, 3)
    model.eval()
    x = a_batch(16, 40)
    maps = [cls_attention(model, x, layer) for layer in (0, 1, -1)]
    assert maps[0].shape == [2, 3, 2, 5]
    assert_close(maps[1], maps[2], 0.0)
    assert 0 < maps[0].sum([2, 3]).min().item() < maps[0].sum([2, 3]).max().item() < 1  # the rest is [CLS] itself
    features = patch_features(model, x)
    assert features.shape == [2, 2, 5, 24]
    # The network goes on from there as it does by itself.
    tokens = model.with_cls_token(features.reshape([2, 10, 24]))
    for block in model.cls_attn_blocks:
        tokens = block(tokens)
    assert_close(model.norm(tokens[:, 0]), model(x), 1e-6)
    assert patch_features(model, x, 0).shape == [2, 2, 5, 24]
    with pytest.raises(
        ValueError, match=re.escape("layer (2) must be from -2 to 1: there are 2 class-attention blocks")
    ):
        cls_attention(model, x, 2)


class Own(nn.Layer):
    patch_size = 8

    def __init__(self):
        super().__init__()
        self.vit = vit()

    def get_last_selfattention(self, x):
        return self.vit.get_last_selfattention(x)

    def feature_map(self, x):
        return x[:, :, ::8, ::8]


def test_backbones_of_others():
    paddle.seed(0)
    network, x = ResNet((1, 1, 1, 1), width=4), a_batch(64, 70)
    network.eval()
    assert_close(patch_features(network, x), network.feature_map(x).transpose([0, 2, 3, 1]), 0.0)
    with pytest.raises(ValueError, match="ResNet has no .CLS. token that attends to patches: .*get_last_selfattention"):
        cls_attention(network, x)
    with pytest.raises(ValueError, match="ResNet has no attention between all tokens"):
        attention_rollout(network, x)
    with pytest.raises(ValueError, match=re.escape("layer (0) must be -1: ResNet shows its last by feature_map")):
        patch_features(network, x, 0)
    own, x = Own(), a_batch()
    assert_close(cls_attention(own, x), cls_attention(own.vit, x), 1e-6)
    assert patch_features(own, x).shape == [2, 3, 5, 3]
    with pytest.raises(ValueError, match="Linear shows no features of patches: give it a method feature_map"):
        patch_features(nn.Linear(2, 2), x)


@pytest.mark.parametrize("function", [cls_attention, patch_features, attention_rollout])
def test_a_block_that_is_not_there(function):
    with pytest.raises(ValueError, match=re.escape("layer (-4) must be from -3 to 2: there are 3 blocks")):
        function(vit(), a_batch(), -4)
