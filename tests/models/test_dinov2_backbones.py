"""The backbones of DINOv2 against recorded outputs.

`dinov2_small.npz` was made with timm 1.0.31 and torch 2.13 on a CPU: timm's `vit_small_patch14_dinov2` ("plain") and
`vit_giant_patch14_reg4_dinov2` ("registers", with gated MLPs) at width 8, depth 2, patch size 2, with random weights,
renamed as in the official files. Position embeddings were resized by torch's `interpolate`, called as the official code
does (bicubic; "plain": scale factors of (side + 0.1)/5, "registers": size and antialias=True), as timm's own resize
differs from that. At 10 x 10 pixels, where nothing is resized, the outputs are timm's own.
"""

from pathlib import Path

import numpy as np
import paddle
import pytest

from passl.models import VisionTransformer, dinov2_vit_small
from passl.models.vision_transformer import Block
from passl.registry import BACKBONES
from tests.models.weights import assert_close, assert_gradients_reach_everything, load

RECORDED = np.load(Path(__file__).with_name("dinov2_small.npz"))
OPTIONS = {
    "plain": {"pos_embed_mode": "scale", "layer_scale": 1.0},
    "registers": {"pos_embed_mode": "antialias", "layer_scale": 1.0, "ffn": "swiglu", "num_register_tokens": 3},
}


def recorded_model(case: str) -> VisionTransformer:
    state = {key.split("/")[2]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{case}/state/")}
    model = VisionTransformer(10, 2, 3, 8, 2, 2, mask_token=True, **OPTIONS[case])
    assert set(model.state_dict()) == set(state)
    load(model, state)
    model.eval()
    return model


@pytest.mark.smoke
@pytest.mark.parametrize("case", OPTIONS)
def test_outputs_at_all_sizes(case):
    model = recorded_model(case)
    inputs = [key for key in RECORDED.files if key.startswith(case) and key.endswith("/input_u8")]
    assert len(inputs) == 4
    for key in inputs:
        x = paddle.to_tensor(RECORDED[key].astype("float32") * 2.0**-6 - 2.0)
        with paddle.no_grad():
            layers = np.stack([layer.numpy() for layer in model.get_intermediate_layers(x, n=2)])
            attention = model.get_last_selfattention(x)
            assert_close(model(x), RECORDED[key.replace("input_u8", "forward")], 2e-5, key)
        assert_close(layers, RECORDED[key.replace("input_u8", "intermediate")], 2e-5, key)
        assert_close(attention[:, :, 0], RECORDED[key.replace("input_u8", "attention_cls_row")], 2e-6, key)
        # As many keys as queries: [CLS], registers, patches.
        assert attention.shape[2:] == [model.num_prefix_tokens + layers.shape[2] - 1] * 2


@pytest.mark.smoke
@pytest.mark.parametrize("case", OPTIONS)
def test_position_encoding(case):
    model = recorded_model(case)
    keys = [key for key in RECORDED.files if key.startswith(case) and key.endswith("/pos_encoding")]
    assert len(keys) == 5
    for key in keys:
        height, width = map(int, key.split("/")[1].split("x"))
        with paddle.no_grad():
            assert_close(model.interpolate_pos_encoding(height, width)[0], RECORDED[key], 1e-6, key)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "embed_dim", "depth", "num_heads", "parameters"),
    # The published 22.1 M, 86.6 M, 304.4 M, 1136.5 M; registers add embed_dim each.
    [
        ("dinov2_vit_small", 384, 12, 6, 22_056_576),
        ("dinov2_vit_base", 768, 12, 12, 86_580_480),
        ("dinov2_vit_large", 1024, 24, 16, 304_368_640),
        ("dinov2_vit_giant", 1536, 40, 24, 1_136_480_768),
    ],
)
def test_sizes(name, embed_dim, depth, num_heads, parameters):
    for num_register_tokens, mode in ((0, "scale"), (4, "antialias")):
        with paddle.LazyGuard():  # Shapes without values: the largest would fill 4.5 GB.
            model = BACKBONES.get(name)(num_register_tokens=num_register_tokens)
        assert (model.embed_dim, len(model.blocks), model.patch_size) == (embed_dim, depth, 14)
        assert model.blocks[0].attn.num_heads == num_heads
        assert model.pos_embed_mode == mode
        assert model.pos_embed.shape == [1, 1 + 37 * 37, embed_dim]
        count = sum(int(np.prod(p.shape)) for p in model.parameters())
        assert count == parameters + num_register_tokens * embed_dim


def test_first_values():
    model = dinov2_vit_small(img_size=28, num_register_tokens=2, layer_scale=1e-5)
    assert model.mask_token.stop_gradient
    assert not model.mask_token.numpy().any()
    registers = model.register_tokens.numpy()
    assert 0 < np.abs(registers).max() < 1e-5
    assert (registers[0, 0] != registers[0, 1]).all()
    for block in model.blocks:
        assert (block.ls1.gamma.numpy() == np.float32(1e-5)).all()
        assert (block.ls2.gamma.numpy() == np.float32(1e-5)).all()


@pytest.mark.parametrize(("dim", "hidden_dim"), [(12, 32), (24, 64), (1536, 4096)])
def test_width_of_the_gated_mlp(dim, hidden_dim):
    """Two thirds of the plain MLP's, rounded up to a multiple of 8, as in the official files."""
    with paddle.LazyGuard():
        block = Block(dim, num_heads=1, ffn="swiglu")
    assert block.mlp.w12.weight.shape == [dim, 2 * hidden_dim]
    assert block.mlp.w3.weight.shape == [hidden_dim, dim]


@pytest.mark.smoke
def test_gradients_reach_everything():
    """But the token for hidden patches, which is frozen."""
    paddle.seed(0)
    model = VisionTransformer(8, 4, 3, 8, 2, 2, mask_token=False, **OPTIONS["registers"])
    x = paddle.randn([2, 3, 12, 8])
    x.stop_gradient = False
    (model(x) ** 2).sum().backward()
    assert_gradients_reach_everything(model, x)


@pytest.mark.smoke
def test_position_encoding_in_float64(float64):
    """Antialiasing keeps a constant constant, also where the grid shrinks; a linear ramp's mean stays."""
    model = VisionTransformer(40, 4, 3, 4, 1, 1, pos_embed_mode="antialias")
    ramp = np.broadcast_to(np.arange(10.0)[:, None, None], (10, 10, 4)).copy()
    ramp[..., 1:] = 1.0
    model.pos_embed.set_value(np.concatenate([np.zeros((1, 4)), ramp.reshape(100, 4)])[None])
    for height, width in [(12, 20), (60, 28), (4, 4)]:
        with paddle.no_grad():
            grid = model.interpolate_pos_encoding(height, width)[0, 1:].numpy()
        assert_close(grid[:, 1:], np.ones_like(grid[:, 1:]), 1e-14)
        assert abs(grid[:, 0].mean() - 4.5) < 1e-12
