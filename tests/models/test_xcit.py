"""XCiT against recorded outputs of the official code."""

import functools
import json
import re

import numpy as np
import paddle
import pytest

from passl.convert import load_torch
from passl.models import LinearProbe, XCiT
from passl.registry import BACKBONES
from tests.models.weights import (
    assert_close,
    assert_gradients_reach_everything,
    generated_state,
    load,
    load_refgen,
    to_torch,
    torch_name,
)

tiny = functools.partial(XCiT, patch_size=8, embed_dim=12, depth=2, num_heads=3)


@pytest.fixture
def recorded(reference):
    if not (reference / "xcit.npz").exists():
        pytest.skip("this recording has no xcit.npz")
    return np.load(reference / "xcit.npz")


def recorded_model(reference, tag: str) -> XCiT:
    """The small model whose weights are stored; the tag (tiny_p8_tokens_norm) says what the weights cannot."""
    state = load_torch(reference / f"xcit_{tag}.pth")
    embed_dim = state["cls_token"].shape[-1]
    model = XCiT(
        patch_size=int(re.search(r"_p(\d+)", tag)[1]),
        in_chans=state["patch_embed.proj.0.0.weight"].shape[1],
        embed_dim=embed_dim,
        depth=number_of("blocks", state),
        num_heads=len(state["blocks.0.attn.temperature"]),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        tokens_norm="tokens_norm" in tag,
        cls_attn_depth=number_of("cls_attn_blocks", state),
    )
    assert [torch_name(name) for name in model.state_dict()] == without_counts(state)
    load(model, state)
    model.eval()
    return model


def number_of(layers: str, state) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{layers}.")})


def without_counts(names) -> list:
    """Paddle's batch norms have no count of batches; nothing reads it where the momentum is a number."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


@pytest.mark.smoke
def test_outputs_and_positions_at_all_sizes(reference, recorded):
    inputs = [key for key in recorded.files if key.endswith("/input_u8")]
    assert inputs
    for key in inputs:
        tag, size, _ = key.split("/")
        model = recorded_model(reference, tag)
        x = paddle.to_tensor(recorded[key].astype("float32") * 2.0**-6 - 2.0)
        with paddle.no_grad():
            assert_close(model(x), recorded[f"{tag}/{size}"], 5e-5, f"{tag}/{size}")
            expected = recorded[f"{tag}/{size}/pos"]
            assert_close(model.pos_embeder(*expected.shape[1:])[0], expected, 5e-6, f"{tag}/{size}/pos")


def test_full_size_builders(reference, recorded):
    salt = str(recorded["salt"])
    refgen = load_refgen(reference)
    matches = [re.fullmatch(r"(xcit_\w+)/(\d+)x(\d+)", key) for key in recorded.files]
    assert any(matches)
    models = {}
    for match in filter(None, matches):
        name, height, width = match[1], int(match[2]), int(match[3])
        if name not in models:
            models[name] = BACKBONES.get(name)()
            load(models[name], generated_state(refgen, models[name], salt))
            models[name].eval()
        x = refgen.image(f"{salt}{name}:{height}x{width}", (len(recorded[match[0]]), 3, height, width))
        with paddle.no_grad():
            assert_close(models[name](paddle.to_tensor(x)), recorded[match[0]], 5e-5, match[0])


def test_names_and_shapes(reference):
    path = reference / "xcit_names_shapes.json"
    if not path.exists():
        pytest.skip("this recording has no xcit_names_shapes.json")
    for name, entries in json.loads(path.read_text()).items():
        state = BACKBONES.get(name)().state_dict()
        ours = {torch_name(key): list(to_torch(key, value).shape) for key, value in state.items()}
        shapes = dict(entries)
        assert list(ours) == without_counts(shapes), name
        assert ours == {key: shapes[key] for key in without_counts(shapes)}, name


@pytest.mark.parametrize(
    ("name", "embed_dim", "depth", "num_heads", "millions"),
    [
        ("xcit_nano_12", 128, 12, 4, 2.9),
        ("xcit_tiny_12", 192, 12, 4, 6.5),
        ("xcit_tiny_24", 192, 24, 4, 11.9),
        ("xcit_small_12", 384, 12, 8, 25.9),
        ("xcit_small_24", 384, 24, 8, 47.3),
        ("xcit_medium_24", 512, 24, 8, 83.9),
    ],
)
def test_sizes(name, embed_dim, depth, num_heads, millions):
    """Published numbers, less the classifier; the deep ones begin with little weight on their branches."""
    for patch_size in (8, 16):
        model = BACKBONES.get(f"{name}_p{patch_size}")(drop_path_rate=0.1)
        assert (model.embed_dim, len(model.blocks), model.patch_embed.patch_size) == (embed_dim, depth, patch_size)
        parameters = sum(p.size for p in model.parameters() if not p.stop_gradient)
        assert abs(parameters / 1e6 - millions) < 0.1
        assert {block.attn.num_heads for block in [*model.blocks, *model.cls_attn_blocks]} == {num_heads}
        assert {block.tokens_norm for block in model.cls_attn_blocks} == {"nano" not in name}
        assert np.isclose(model.blocks[0].gamma1.numpy(), 1.0 if depth == 12 else 1e-5).all()
        # Stochastic depth: one rate for all blocks, as in the official code, not a ramp.
        assert {block.drop_path.rate for block in model.blocks} == {0.1}


@pytest.mark.smoke
def test_initialisation():
    """Linear and [CLS] N(0, 0.02), convolutions at PyTorch's default, everything else 1 or 0."""
    paddle.seed(0)
    model = XCiT(embed_dim=64, depth=2, num_heads=2, layer_scale=0.25)
    for name, value in model.state_dict().items():
        value = value.numpy()
        if value.ndim == 4:
            bound = 1.0 / np.sqrt(np.prod(value.shape[1:]))
            assert bound * 0.95 < np.abs(value).max() <= bound * (1 + 1e-6), name
        elif name == "cls_token" or value.ndim == 2:
            assert abs(value.std() / 0.02 - 1.0) < 5.0 / np.sqrt(2 * value.size), name
        elif "gamma" in name:
            assert (value == 0.25).all(), name
        elif "local_mp.conv" in name or "token_projection" in name:
            assert np.abs(value).max() <= 1.0 / 3.0, name
            assert value.std() > 0, name
        else:
            assert (value == float(name.endswith(("weight", "_variance", "temperature")))).all(), name


@pytest.mark.smoke
@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("tokens_norm", [True, False])
def test_gradients_reach_everything(patch_size, tokens_norm):
    paddle.seed(0)
    model = tiny(patch_size=patch_size, tokens_norm=tokens_norm, in_chans=2, drop_path_rate=0.1)
    x = paddle.randn([4, 2, 32, 48])
    x.stop_gradient = False
    output = model(x)
    assert output.shape == [4, model.embed_dim]
    (output**3).sum().backward()
    assert_gradients_reach_everything(model, x)


def test_tokens_that_are_all_zero_have_finite_gradients():
    """The attention divides by the length of each channel over the tokens."""
    model = tiny()
    attention = model.blocks[0].attn
    x = paddle.zeros([2, 6, 12])
    x.stop_gradient = False
    attention(x).sum().backward()
    assert np.isfinite(x.grad.numpy()).all()
    assert np.isfinite(attention.qkv.weight.grad.numpy()).all()


def test_patch_tokens_go_through_both_branches_of_the_class_attention():
    """Which two class attention blocks alone do not show: the next norm takes the factor 2 out."""
    model = tiny(tokens_norm=False, layer_scale=0.5)
    block = model.cls_attn_blocks[0]
    x = paddle.randn([2, 7, 12])
    expected = 2.0 * (x + 0.5 * block.norm1(x))
    assert_close(block(x)[:, 1:], expected[:, 1:], 1e-6)


def test_rows_come_before_columns_in_the_positions():
    """Exchanging the two halves of the projection's weights transposes the grid."""
    model = tiny()
    rows, columns = model.pos_embeder(2, 5), model.pos_embeder(5, 2)
    assert rows.shape == [1, 12, 2, 5]
    half = model.pos_embeder.num_frequencies
    with paddle.no_grad():
        weight = model.pos_embeder.token_projection.weight
        weight.set_value(paddle.concat([weight[:, half:], weight[:, :half]], axis=1))
    assert_close(model.pos_embeder(2, 5).transpose([0, 1, 3, 2]), columns, 1e-6)


def test_linear_probe_takes_the_output():
    probe = LinearProbe(tiny, num_classes=3)
    x = paddle.randn([2, 3, 16, 24])
    assert_close(probe.features(x), probe.backbone(x), 0.0)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 30)])
def test_size_that_the_patch_does_not_divide(shape):
    with pytest.raises(ValueError, match=rf"{shape[2]} x {shape[3]}.*multiples of patch_size \(8\)"):
        tiny()(paddle.zeros(shape))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 14}, r"patch_size \(14\) must be 8 or 16"),
        ({"embed_dim": 10}, r"embed_dim \(10\) must be a multiple of num_heads \(3\)"),
        ({"embed_dim": 3}, r"embed_dim \(3\) must be at least patch_size / 2 \(4\)"),
        ({"num_heads": 0}, r"num_heads \(0\) must be at least 1"),
        ({"depth": 0}, r"depth \(0\) must be at least 1"),
        ({"drop_path_rate": 1.0}, r"drop path rate \(1.0\) must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
