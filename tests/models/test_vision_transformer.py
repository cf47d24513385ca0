"""The vision transformer against recorded outputs of the official code."""

import json
import re

import numpy as np
import paddle
import pytest

from passl.convert import load_torch
from passl.models import VisionTransformer, vit_base, vit_small, vit_tiny
from passl.registry import BACKBONES
from tests.models.weights import assert_close, generated_state, load, load_refgen, to_torch


def images(recorded: np.ndarray) -> paddle.Tensor:
    """Recorded bytes are exact images by this rule (README of the recordings)."""
    return paddle.to_tensor(recorded.astype(paddle.get_default_dtype()) * 2.0**-6 - 2.0)


def recorded_model(reference, patch_size: int, recorded) -> VisionTransformer:
    config = dict(zip(recorded["cfg_names"].tolist(), recorded["cfg_values"].tolist()))
    mlp_ratio = config.pop("mlp_ratio")
    state = load_torch(reference / f"vit_p{patch_size}_backbone.pth")
    sizes = {name: int(value) for name, value in config.items()}
    model = VisionTransformer(img_size_of(state, patch_size), mlp_ratio=mlp_ratio, **sizes)
    assert list(model.state_dict()) == recorded["state_dict_names"].tolist()
    load(model, state)
    model.eval()
    return model


def img_size_of(state, patch_size: int) -> int:
    return patch_size * round((state["pos_embed"].shape[1] - 1) ** 0.5)


@pytest.mark.smoke
@pytest.mark.parametrize("patch_size", [16, 8])
def test_outputs_at_all_sizes(reference, patch_size):
    recorded = np.load(reference / f"vit_p{patch_size}_io.npz")
    model = recorded_model(reference, patch_size, recorded)
    sizes = [key.split("/")[0] for key in recorded.files if key.endswith("/input_u8")]
    assert sizes
    for size in sizes:
        x = images(recorded[f"{size}/input_u8"])
        with paddle.no_grad():
            assert_close(model(x), recorded[f"{size}/forward"], 2e-5, f"{size}/forward")
            layers = [layer.numpy() for layer in model.get_intermediate_layers(x, n=4)]
            attention = model.get_last_selfattention(x).numpy()
            actual = {
                "intermediate4_cls": np.stack([layer[:, 0] for layer in layers]),
                "intermediate4_patchmean": np.stack([layer[:, 1:].mean(1) for layer in layers]),
                "intermediate4_full": np.stack(layers),
                "intermediate1_full_first_image": model.get_intermediate_layers(x, n=1)[0].numpy()[0],
                "prepare_tokens": model.prepare_tokens(x),
                "last_attention_cls_row": attention[:, :, 0],
                "last_attention_col_mean": attention.mean(2),
                "last_attention_full_first_image": attention[0],
            }
        for name, value in actual.items():
            if f"{size}/{name}" in recorded:
                tolerance = 1e-6 if "attention" in name else 2e-5
                assert_close(value, recorded[f"{size}/{name}"], tolerance, f"{size}/{name}")


@pytest.mark.parametrize("patch_size", [16, 8])
def test_outputs_in_float64(reference, float64, patch_size):
    recorded = np.load(reference / f"vit_p{patch_size}_io.npz")
    model = recorded_model(reference, patch_size, recorded)
    for key in [key for key in recorded.files if key.endswith("/forward_f64")]:
        with paddle.no_grad():
            output = model(images(recorded[key.replace("forward_f64", "input_u8")]))
        assert_close(output, recorded[key], 1e-10, key)


@pytest.mark.smoke
def test_position_encoding(reference):
    recorded = np.load(reference / "pos_encoding.npz")
    bases = [key for key in recorded.files if key.endswith("/pos_embed")]
    assert bases
    for base in bases:
        prefix = base[: -len("pos_embed")]
        patch_size = int(prefix.split("/")[0][1:])
        pos_embed = recorded[base]
        side = round((pos_embed.shape[1] - 1) ** 0.5)
        for key in recorded.files:
            size = key[len(prefix) :]
            if key.startswith(prefix) and size[0].isdigit():
                dtype = "float64" if size.endswith("_f64") else "float32"
                height, width = map(int, size.replace("_f64", "").split("x"))
                actual = interpolated(pos_embed.astype(dtype), side * patch_size, patch_size, height, width)
                assert_close(actual[0], recorded[key], 1e-10 if dtype == "float64" else 5e-6, key)


def interpolated(pos_embed, img_size, patch_size, height, width) -> np.ndarray:
    dtype = paddle.get_default_dtype()
    paddle.set_default_dtype(str(pos_embed.dtype))
    try:
        dim = pos_embed.shape[-1]
        model = VisionTransformer(img_size, patch_size, 1, dim, depth=1, num_heads=1)
        model.pos_embed.set_value(pos_embed)
        with paddle.no_grad():
            return model.interpolate_pos_encoding(height, width).numpy()
    finally:
        paddle.set_default_dtype(dtype)


def test_position_encoding_is_differentiable():
    model = VisionTransformer(32, 8, 1, embed_dim=4, depth=1, num_heads=1)
    model.interpolate_pos_encoding(16, 40).sum().backward()
    gradient = model.pos_embed.grad.numpy()
    assert_close(gradient[0, 0], np.ones(4), 1e-6)
    assert_close(gradient[0, 1:].sum(0), np.full(4, 2.0 * 5.0), 1e-4)


def full_size_keys(recorded, small: bool) -> list:
    """(key, builder, patch size, height, width) of the recordings that are small enough for CI, or of the rest."""
    found = []
    for key in recorded.files:
        match = re.fullmatch(r"(vit_[a-z]+)(\d+)/(\d+)x(\d+)", key)
        if match:
            patch_size, height, width = map(int, match.groups()[1:])
            tokens = (height // patch_size) * (width // patch_size)
            if (tokens <= 200 and match[1] != "vit_base") == small:
                found.append((key, match[1], patch_size, height, width))
    return found


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_full_size_builders(reference, small):
    recorded = np.load(reference / "fullsize_outputs.npz")
    salt = str(recorded["salt"])
    refgen = load_refgen(reference)
    assert full_size_keys(recorded, True) + full_size_keys(recorded, False)
    for key, name, patch_size, height, width in full_size_keys(recorded, small):
        model = BACKBONES.get(name)(patch_size=patch_size)
        load(model, generated_state(refgen, model, salt))
        model.eval()
        tag = key.split("/")[0]
        x = refgen.image(f"{salt}{tag}:{height}x{width}", (2, 3, height, width))
        with paddle.no_grad():
            assert_close(model(paddle.to_tensor(x)), recorded[key], 5e-5, key)


def test_names_and_shapes(reference):
    path = reference / "names_shapes.json"
    if not path.exists():
        pytest.skip("this recording has no names_shapes.json")
    recorded = json.loads(path.read_text())
    builders = {"vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base}
    checked = 0
    for tag, entries in recorded.items():
        match = re.fullmatch(r"(vit_[a-z]+?)_?p?(\d+)", tag)
        if match:
            model = builders[match[1]](patch_size=int(match[2]))
            ours = [[name, list(to_torch(name, p).shape)] for name, p in model.state_dict().items()]
            assert ours == entries, tag
            checked += 1
    assert checked


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 30)])
def test_size_that_the_patch_does_not_divide(shape):
    model = VisionTransformer(32, 8, embed_dim=4, depth=1, num_heads=1)
    with pytest.raises(ValueError, match=rf"{shape[2]} x {shape[3]}.*multiples of patch_size \(8\)"):
        model(paddle.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 10, "num_heads": 3}, r"embed_dim \(10\) must be a multiple of num_heads \(3\)"),
        ({"img_size": 8, "patch_size": 16}, r"img_size \(8\) must be at least patch_size \(16\)"),
        ({"num_heads": 0}, r"num_heads \(0\) must be at least 1"),
        ({"patch_size": 0}, r"patch_size \(0\) must be at least 1"),
        ({"depth": 0}, r"depth \(0\) must be at least 1"),
        ({"embed_dim": 0}, r"embed_dim \(0\) must be at least 1"),
        ({"in_chans": 0}, r"in_chans \(0\) must be at least 1"),
        ({"pos_embed_mode": "crop"}, r"pos_embed_mode \('crop'\) must be one of scale, size, antialias"),
        ({"ffn": "relu"}, r"ffn \('relu'\) must be 'mlp' or 'swiglu'"),
        ({"num_register_tokens": -1}, r"num_register_tokens \(-1\) must be at least 0"),
        ({"drop_path_rate": 1.0}, r"drop path rate \(1.0\) must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3, **arguments})


def test_number_of_layers_must_exist():
    model = VisionTransformer(16, 8, embed_dim=4, depth=2, num_heads=1)
    with pytest.raises(ValueError, match=r"n \(3\) must be between 1 and the number of blocks \(2\)"):
        model.get_intermediate_layers(paddle.zeros([1, 3, 16, 16]), n=3)


def test_drop_path():
    """Whole samples are dropped, the kept ones scaled up; the ramp over the blocks starts at 0; eval drops nothing."""
    model = VisionTransformer(16, 8, embed_dim=4, depth=3, num_heads=1, drop_path_rate=0.4)
    assert np.allclose([block.drop_path.rate for block in model.blocks], [0.0, 0.2, 0.4])
    drop_path = model.blocks[2].drop_path
    paddle.seed(0)
    rows = drop_path(paddle.ones([2000, 3])).numpy()
    assert (rows == rows[:, :1]).all()
    assert np.allclose(np.unique(rows), [0.0, 1 / 0.6])
    assert abs((rows[:, 0] > 0).mean() - 0.6) < 5 * (0.24 / 2000) ** 0.5
    drop_path.eval()
    assert (drop_path(paddle.ones([8, 3])).numpy() == 1.0).all()
