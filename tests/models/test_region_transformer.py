"""The transformers of clemsgrs/dino, over regions and over patches, against recorded outputs of that code."""

import functools
import json

import numpy as np
import paddle
import pytest

from passl.convert import load_torch
from passl.models import DINO, DINOHead, LinearProbe, RegionTransformer, VisionTransformer, hvit_xs
from tests.models.weights import (
    assert_close,
    assert_gradients_reach_everything,
    generated_state,
    load,
    load_refgen,
    to_torch,
)


@pytest.fixture
def meta(reference):
    if not (reference / "hipt_meta.json").exists():
        pytest.skip("this recording has no hipt_*")
    return json.loads((reference / "hipt_meta.json").read_text())


def recorded_model(reference, meta, kind: str):
    state = load_torch(reference / f"hipt_{kind}_backbone.pth")
    config = meta[kind]
    arch = {key: config[key] for key in ("depth", "num_heads", "mlp_ratio")}
    grid_size = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    if kind == "region":
        model = RegionTransformer(config["input_embed_dim"], grid_size, config["output_embed_dim"], **arch)
    else:
        patch_size = config["patch_size"]
        arch.update(patch_size=patch_size, embed_dim=config["embed_dim"], pos_embed_mode="size")
        model = VisionTransformer(grid_size * patch_size, **arch)
    assert list(model.state_dict()) == list(state)
    load(model, state)
    model.eval()
    return model


def recorded_input(recorded, prefix: str) -> paddle.Tensor:
    """Recorded bytes are exact images by this rule (README of the recordings)."""
    if prefix + "input_u8" in recorded:
        return paddle.to_tensor(recorded[prefix + "input_u8"].astype("float32") * 2.0**-6 - 2.0)
    return paddle.to_tensor(recorded[prefix + "input_f16"].astype("float32"))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["region", "patch"])
def test_outputs_at_all_sizes(reference, meta, kind):
    recorded = np.load(reference / "hipt_models.npz")
    model = recorded_model(reference, meta, kind)
    prefixes = [key[: -len("mask")] for key in recorded.files if key.startswith(f"{kind}/") and key.endswith("/mask")]
    assert prefixes
    for prefix in prefixes:
        x, mask = recorded_input(recorded, prefix), paddle.to_tensor(recorded[prefix + "mask"])
        with paddle.no_grad():
            actual = {
                "forward": model(x),
                "forward_masked": model(x, mask),
                "intermediate4_cls": np.stack([layer[:, 0].numpy() for layer in model.get_intermediate_layers(x, n=4)]),
                "last_attention_cls_row": model.get_last_selfattention(x)[:, :, 0],
                "last_attention_masked_cls_row": model.get_last_selfattention(x, mask)[:, :, 0],
                "pos_encoding": model.interpolate_pos_encoding(*x.shape[2:])[0],
            }
            masked_layer = model.get_intermediate_layers(x, mask=mask)[0]
        for name in {key[len(prefix) :] for key in recorded.files if key.startswith(prefix)} & set(actual):
            tolerance = 1e-6 if "attention" in name else 5e-6 if name == "pos_encoding" else 2e-5
            assert_close(actual[name], recorded[prefix + name], tolerance, prefix + name)
        assert_close(masked_layer[:, 0], recorded[prefix + "forward_masked"], 2e-5, prefix)


def test_full_size(reference, meta):
    recorded = np.load(reference / "hipt_models.npz")
    refgen = load_refgen(reference)
    salt = str(recorded["salt"])
    model = hvit_xs()
    if "hvit_xs_names" in meta:
        ours = [[name, list(to_torch(name, value).shape)] for name, value in model.state_dict().items()]
        assert ours == meta["hvit_xs_names"]
    load(model, generated_state(refgen, model, salt))
    model.eval()
    keys = [key for key in recorded.files if key.startswith("hvit_xs_refgen/")]
    assert keys
    for key in keys:
        size = key.split("/")[1]
        x = refgen.image(f"{salt}hvit:{size}", (len(recorded[key]), 384, *map(int, size.split("x"))))
        with paddle.no_grad():
            assert_close(model(paddle.to_tensor(x)), recorded[key], 2e-5, key)


@pytest.mark.smoke
def test_masked_tokens_have_no_influence():
    """Neither on values nor on gradients; a mask of ones is no mask."""
    paddle.seed(0)
    model = RegionTransformer(4, grid_size=3, embed_dim=8, depth=2, num_heads=2)
    x = paddle.randn([2, 4, 2, 3])
    mask = paddle.to_tensor([[1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1]])
    assert_close(model(x, paddle.ones_like(mask)), model(x), 1e-6)
    other = x.clone()
    other[0, :, 0, 2] = 5.0
    other[1, :, 0, 0] = -5.0
    assert_close(model(other, mask), model(x, mask), 1e-6)
    assert (model(other) - model(x)).abs().max().item() > 1e-3
    x.stop_gradient = False
    (model(x, mask) ** 2).sum().backward()
    reached = x.grad.abs().max(1).reshape([2, -1]).numpy() > 1e-12
    assert (reached == (mask[:, 1:].numpy() > 0)).all()


@pytest.mark.smoke
def test_gradients_reach_everything():
    paddle.seed(0)
    model = RegionTransformer(5, grid_size=3, embed_dim=8, depth=2, num_heads=2, drop_path_rate=0.1)
    model.eval()
    x = paddle.randn([2, 5, 4, 3])
    x.stop_gradient = False
    (model(x) ** 2).sum().backward()
    assert_gradients_reach_everything(model, x)


def test_linear_probe_takes_its_layers():
    backbone = RegionTransformer(5, grid_size=3, embed_dim=8, depth=2, num_heads=2)
    probe = LinearProbe(lambda: backbone, num_classes=3, n_last_blocks=2)
    assert probe.predict(paddle.randn([2, 5, 3, 3])).shape == [2, 3]


def test_dropout_is_of_the_student_in_training():
    backbone = functools.partial(RegionTransformer, 4, grid_size=3, embed_dim=8, depth=1, num_heads=2, drop_rate=0.5)
    method = DINO(backbone, functools.partial(DINOHead, out_dim=6, hidden_dim=8, bottleneck_dim=4))
    method.train()
    x = paddle.randn([2, 4, 3, 3])
    student, teacher = method.student.backbone, method.teacher.backbone
    assert (student(x) - student(x)).abs().max().item() > 1e-3
    assert_close(teacher(x), teacher(x), 0)
    student.eval()
    assert_close(student(x), teacher(x), 1e-6)


def test_features_of_another_width():
    with pytest.raises(ValueError, match="the features of the patches are 5 wide, and in_chans is 4"):
        RegionTransformer(4, embed_dim=8, depth=1, num_heads=2)(paddle.zeros([1, 5, 3, 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_rate": 1.0}, r"drop_rate \(1.0\) must be in \[0, 1\)"),
        ({"grid_size": 0}, r"grid_size \(0\) must be at least 1"),
        ({"in_chans": 0}, r"in_chans \(0\) must be at least 1"),
        ({"num_heads": 5}, r"embed_dim \(8\) must be a multiple of num_heads \(5\)"),
        ({"pos_embed_mode": "crop"}, r"pos_embed_mode \('crop'\) must be one of scale, size, antialias"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegionTransformer(**{"embed_dim": 8, "depth": 1, "num_heads": 2, **arguments})


def test_mask_of_another_shape():
    model = RegionTransformer(4, grid_size=2, embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"mask \(\[2, 4\]\) must be \[images, tokens\], here \[2, 5\]"):
        model(paddle.zeros([2, 4, 2, 2]), paddle.ones([2, 4]))
