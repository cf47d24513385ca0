"""Layer-wise learning rates: the share of every parameter of every kind of backbone."""

from __future__ import annotations

import functools

import paddle
import pytest
from paddle import nn

from passl.engine.optim import LARS, AdamW, Momentum
from passl.models import DINO, DINOHead, RegionTransformer, ResNet, VisionTransformer, XCiT
from passl.models.layer_rates import layer_numbers, layer_rates

# By the prefixes of the names: the layers of backbones with two, four (a ResNet of one block at each resolution), three
# (XCiT with one class attention) blocks.
VIT = {"cls_token": 0, "pos_embed": 0, "patch_embed.": 0, "blocks.0.": 1, "blocks.1.": 2, "norm.": 3}
LAYERS = {
    "vit": (functools.partial(VisionTransformer, 16, 8, 3, 12, 2, 2), VIT),
    "dinov2": (
        functools.partial(
            VisionTransformer, 16, 8, 3, 12, 2, 2, num_register_tokens=2, layer_scale=1.0, ffn="swiglu", mask_token=True
        ),
        {**VIT, "register_tokens": 0, "mask_token": 0},
    ),
    "region": (
        functools.partial(RegionTransformer, 5, 2, 12, 2, 2),
        {("phi." if name == "patch_embed." else name): layer for name, layer in VIT.items()},
    ),
    "resnet": (
        functools.partial(ResNet, (1, 2, 1, 1), width=4, num_classes=3),
        {
            "conv1.": 0, "bn1.": 0, "layer1.0.": 1, "layer2.0.": 2, "layer2.1.": 3, "layer3.0.": 4, "layer4.0.": 5,
            "fc.": 6,
        },
    ),
    "xcit": (
        functools.partial(XCiT, 16, 3, 16, 2, 2, cls_attn_depth=1),
        {
            "cls_token": 0, "patch_embed.": 0, "pos_embeder.": 0,
            "blocks.0.": 1, "blocks.1.": 2, "cls_attn_blocks.0.": 3, "norm.": 4,
        },
    ),
}  # fmt: skip


def layer_by_prefix(name: str, layers: dict) -> int:
    found = [layer for prefix, layer in layers.items() if name.startswith(prefix)]
    assert len(found) == 1, name
    return found[0]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", LAYERS)
def test_every_parameter_has_the_layer_that_its_name_says(kind):
    build, layers = LAYERS[kind]
    backbone = build()
    names = [name for name, _ in backbone.named_parameters()]
    assert layer_numbers(backbone) == {name: layer_by_prefix(name, layers) for name in names}
    assert set(layers.values()) == set(range(max(layers.values()) + 1))
    last = max(layers.values())
    assert layer_rates(backbone, 0.75) == {name: 0.75 ** (last - layer_by_prefix(name, layers)) for name in names}
    assert layer_rates(backbone, 1.0) == dict.fromkeys(names, 1.0)


def test_the_rates_of_a_vit_of_twelve_blocks():
    """As published for BEiT, MAE and DINOv2."""
    rates = layer_rates(VisionTransformer(16, 8, 3, 12, 12, 2), 0.65)
    assert rates["patch_embed.proj.weight"] == rates["cls_token"] == 0.65**13
    assert rates["blocks.0.attn.qkv.weight"] == 0.65**12
    assert rates["blocks.9.mlp.fc1.bias"] == 0.65**3
    assert rates["blocks.11.norm2.weight"] == 0.65
    assert rates["norm.weight"] == 1.0


def test_what_has_no_layer_rates():
    class Plain(nn.Linear):
        embed_dim = 3

    backbone = Plain(3, 3)
    with pytest.raises(ValueError, match="Plain has no blocks .* leave layer_decay at 1"):
        layer_rates(backbone, 0.9)
    assert set(layer_rates(backbone, 1)) == {"weight", "bias"}
    for decay in (0, -0.5, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"layer_decay \(.*\) must be above 0 and at most 1"):
            layer_rates(backbone, decay)


# --- in DINO ---


def tiny(kind: str = "vit", **arguments) -> DINO:
    method = DINO(LAYERS[kind][0], functools.partial(DINOHead, out_dim=12, hidden_dim=8, bottleneck_dim=4), **arguments)
    for name, parameter in method.named_parameters():
        parameter.name = name
    return method


def share_of(name: str, layer_decay: float, backbone_lr: float, kind: str = "vit") -> float:
    prefix, layers = "student.backbone.", LAYERS[kind][1]
    if not name.startswith(prefix):
        return 1.0
    return backbone_lr * layer_decay ** (max(layers.values()) - layer_by_prefix(name[len(prefix) :], layers))


def test_by_default_the_groups_are_those_of_always():
    groups = tiny().param_groups()
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2
    assert [group["weight_decay"] for group in groups] == [1.0, 0.0]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("layer_decay", "backbone_lr"), [(0.5, 1.0), (1.0, 0.1), (0.8, 0.25)])
def test_groups_have_the_shares_of_their_parameters(kind, layer_decay, backbone_lr):
    method = tiny(kind, layer_decay=layer_decay, backbone_lr=backbone_lr)
    seen = []
    for group in method.param_groups():
        for parameter in group["params"]:
            assert group.get("learning_rate", 1.0) == share_of(parameter.name, layer_decay, backbone_lr, kind)
            is_decayed = parameter.ndim > 1 and not parameter.name.endswith(".bias")
            assert group["weight_decay"] == float(is_decayed), parameter.name
            seen.append(parameter.name)
    wanted = [name for name, p in method.named_parameters() if not p.stop_gradient]
    assert sorted(seen) == sorted(wanted)


@pytest.mark.smoke
@pytest.mark.parametrize("optimizer", [AdamW, Momentum, LARS])
def test_a_step_moves_by_the_shares(optimizer, float64):
    """The first step of any of these is proportional to the learning rate."""
    moves, states = [], []
    for arguments in ({}, {"layer_decay": 0.5, "backbone_lr": 0.3}):
        paddle.seed(1)
        method = tiny(**arguments)
        rule = optimizer(method.param_groups())
        rule.set(0.01, 0.1)
        batch = {"global_crops": paddle.randn([4, 3, 16, 16]), "local_crops": paddle.randn([4, 3, 8, 8])}
        method(batch, teacher_temp=0.04)["loss"].backward()
        before = {p.name: p.numpy().copy() for p in rule.parameters}
        rule.step()
        moves.append({p.name: p.numpy() - before[p.name] for p in rule.parameters})
        states.append(set(rule.state_dict()))
    assert states[0] == states[1]
    for name, whole in moves[0].items():
        expected = whole * share_of(name, 0.5, 0.3)
        assert abs(moves[1][name] - expected).max() <= 1e-14 + 1e-9 * abs(expected).max(), name


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backbone_lr": 0}, r"backbone_lr \(0\) must be above 0"),
        ({"backbone_lr": float("inf")}, "backbone_lr"),
        ({"layer_decay": 1.5}, r"layer_decay \(1.5\) must be above 0 and at most 1"),
        ({"freeze_backbone": "1 epoch"}, "freeze_backbone: duration '1 epoch' must look like '10ep'"),
        ({"freeze_backbone": -1}, "freeze_backbone: duration -1 must be finite and not negative"),
    ],
)
def test_arguments_that_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        tiny(**arguments)
