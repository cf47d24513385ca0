"""The architecture is read off names and shapes: that of every registered network, and of the real files' tables."""

from __future__ import annotations

import inspect
import json

import pytest

from passl.convert import ConversionError
from passl.convert.architecture import given, infer, infer_head
from passl.convert.layout import COUNTER, blueprint, counters, slots
from passl.models import DINOHead
from passl.registry import BACKBONES
from tests.convert import sources


def shapes_of(layer):
    return {slot.torch_name: slot.torch_shape for slot in slots(layer)}


def recorded_tables(reference):
    """[(name, {tensor: shape} in order)] of the official models."""
    found = []
    for file in ("names_shapes.json", "xcit_names_shapes.json"):
        if (reference / file).exists():
            tables = json.loads((reference / file).read_text())
            found += [(name, {key: tuple(shape) for key, shape in rows}) for name, rows in tables.items()]
    return found


@pytest.mark.smoke
def test_names_and_shapes_of_the_official_models(reference):
    """One to one and in order; PyTorch's batch norms have a counter each beside what Paddle's have."""
    tables = recorded_tables(reference)
    if not tables:
        pytest.skip("this recording has no names_shapes.json")
    for name, table in tables:
        weights = {key: shape for key, shape in table.items() if not key.endswith(COUNTER)}
        if "last_layer.weight_g" in table:
            layout = slots(blueprint(DINOHead, infer_head(weights)))
        else:
            architecture = infer(weights)
            assert architecture.unknown == (), name
            assert architecture.name in name.replace("_fc_identity", "") or not name.startswith(("vit", "res")), name
            layout = slots(architecture.blueprint())
        assert [(slot.torch_name, slot.torch_shape) for slot in layout] == list(weights.items()), name
        assert counters(layout) == [key for key in table if key.endswith(COUNTER)], name


def registered():
    """Every registered network of a known family that is made without arguments."""
    families = ("vit_", "dinov2_", "resnet", "xcit_", "hvit_")
    return [name for name in sorted(BACKBONES.names()) if name.startswith(families)]


def test_registered_networks_are_told_apart():
    names = registered()
    assert len(names) > 20
    for name in names:
        architecture = infer(shapes_of(blueprint(BACKBONES.get(name), {})))
        assert (architecture.name, architecture.arguments, architecture.unknown) == (name, {}, ())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_small", {"patch_size": 8}),
        ("vit_tiny", {"img_size": 96, "in_chans": 1}),
        ("dinov2_vit_small", {"num_register_tokens": 4, "img_size": 224}),
        ("resnet50", {"in_chans": 1}),
        ("hvit_xs", {"in_chans": 192, "grid_size": 16}),
        ("VisionTransformer", {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 3, "num_heads": 2}),
        ("VisionTransformer", {"embed_dim": 64, "depth": 1, "num_heads": 1, "mlp_ratio": 2.5, "qkv_bias": False}),
        ("VisionTransformer", {"embed_dim": 320, "depth": 1, "num_heads": 5, "layer_scale": 1.0, "ffn": "swiglu"}),
        ("RegionTransformer", {"in_chans": 20, "grid_size": 5, "embed_dim": 128, "depth": 2, "num_heads": 2}),
        ("ResNet", {"depths": [1, 2, 3, 1], "bottleneck": False, "width": 8}),
        ("ResNet", {"depths": [3, 4, 6, 3], "width": 32}),
    ],
)
def test_arguments_are_found(name, arguments):
    expected = shapes_of(blueprint(BACKBONES.get(name), arguments))
    architecture = infer(expected)
    assert (architecture.name, architecture.arguments, architecture.unknown) == (name, arguments, ())
    assert shapes_of(architecture.blueprint()) == expected


def test_what_no_shape_shows_is_said_and_can_be_given():
    shapes = shapes_of(blueprint(BACKBONES.get("VisionTransformer"), {"embed_dim": 48, "depth": 2, "num_heads": 3}))
    architecture = infer(shapes)
    assert architecture.unknown == ("num_heads",)
    assert "not visible in the file: num_heads" in str(architecture)
    assert shapes_of(architecture.blueprint()) == shapes
    told = infer(shapes, {"num_heads": 3})
    assert told.unknown == ()
    assert told.arguments["num_heads"] == 3
    xcit = shapes_of(sources.xcit())
    assert infer(xcit).unknown == ("tokens_norm",)
    assert infer(xcit, {"tokens_norm": False}).arguments["tokens_norm"] is False


def test_widths_that_are_no_round_multiple():
    """int(embed_dim * mlp_ratio) has to give the very width, whatever floats do."""
    for hidden in range(1, 400, 19):
        shapes = shapes_of(sources.vit())
        shapes["blocks.0.mlp.fc1.weight"] = (hidden, 64)
        block = infer(shapes).blueprint().blocks[0]
        assert block.mlp.fc1.weight.shape == [64, hidden]


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_heads(num_layers, use_bn):
    arguments = {"in_dim": 6, "out_dim": 9, "num_layers": num_layers, "hidden_dim": 7, "bottleneck_dim": 5}
    expected = shapes_of(DINOHead(use_bn=use_bn, **arguments))
    found = infer_head(expected)
    assert shapes_of(DINOHead(**found)) == expected
    assert found.get("use_bn", False) == (use_bn and num_layers > 1)


def test_a_named_architecture_takes_the_sizes_that_the_file_shows():
    shapes = shapes_of(blueprint(BACKBONES.get("vit_small"), {"patch_size": 8, "img_size": 96}))
    assert given("vit_small", shapes, {}).arguments == {"patch_size": 8, "img_size": 96}
    assert given("vit_small", shapes, {"img_size": 64}).arguments == {"patch_size": 8, "img_size": 64}
    assert "num_classes" in inspect.signature(BACKBONES.get("resnet18")).parameters
    assert given("resnet18", shapes_of(BACKBONES.get("resnet18")()), {}).arguments == {}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("vit", {"pos_embed": None}, "pos_embed is missing"),
        ("vit", {"pos_embed": (1, 7, 64)}, "pos_embed has 7 positions"),
        ("vit", {"pos_embed": (1, 6, 64), "dist_token": (1, 1, 64)}, "a distilled DeiT"),
        ("vit", {"pos_embed": (5, 64)}, r"pos_embed has \[5, 64\] for 3 sizes"),
        ("vit", {"blocks.1000000000.norm1.bias": (64,)}, "of blocks there are only the numbers 0, 1, 1000000000"),
        ("resnet", {"layer3.7.conv1.weight": (4, 4, 3, 3)}, "of layer3 there are only the numbers 0, 7"),
        ("resnet", {"conv1.weight": None}, "conv1.weight is missing"),
        ("xcit", {"blocks.0.attn.temperature": None}, "temperature is missing"),
        ("xcit", {"cls_token": (1, 1, 0)}, "cls_token has"),
        ("region", {"phi.0.weight": (64,)}, "phi.0.weight has"),
    ],
)
def test_sizes_that_contradict_each_other(family, change, message):
    shapes = {**shapes_of(sources.BACKBONES[family]()), **change}
    with pytest.raises(ConversionError, match=message):
        infer({name: shape for name, shape in shapes.items() if shape is not None})
