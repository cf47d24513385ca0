"""Blocks that are computed again in the backward pass: the same losses, weights and statistics, to the last bit."""

from __future__ import annotations

import weakref

import paddle
import pytest
from paddle import nn

from passl import distributed
from passl.config import ConfigError
from passl.engine import build
from passl.engine.optim import AdamW
from passl.engine.recompute import recompute_blocks
from passl.models.dinov2 import backbones as dinov2
from passl.models.method import Method
from passl.models.region_transformer import RegionTransformer
from passl.models.resnet import ResNet
from passl.models.vision_transformer import VisionTransformer
from passl.models.xcit import XCiT

BACKBONES = {
    "vit": lambda: VisionTransformer(16, 8, 3, 12, 3, 2, drop_path_rate=0.3),
    "dinov2": lambda: dinov2._vision_transformer((12, 3, 2), 8, 16, 3, 0.3, 2, 1.0, True, True, "swiglu"),
    "region": lambda: RegionTransformer(3, 16, 12, 3, 2, drop_path_rate=0.3, drop_rate=0.2),
    "xcit": lambda: XCiT(8, 3, 12, 2, 2, drop_path_rate=0.3),  # with batch norms in its blocks
}


class Squares(Method):
    """Calls its backbone twice, on images of two sizes."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, sizes):
        outputs = [self.backbone(paddle.rand([6, 3, size, size])) for size in sizes]
        return sum((output**power).sum() for power, output in enumerate(outputs, start=2))


def calls_of(layer):
    """Counts the calls of the last block's attention."""
    counted = []
    layer.blocks[-1].attn.register_forward_post_hook(lambda *_: counted.append(1))
    return counted


def train(name, *amount, accum_steps=2):
    """Losses of three steps, everything in the method afterwards, and the calls of the last block."""
    paddle.seed(1)
    method = Squares(BACKBONES[name]())
    for key, parameter in method.named_parameters():
        parameter.name = key
    counted = calls_of(method.backbone)
    if amount:
        recompute_blocks(method, *amount)
    optimizer = AdamW(method.param_groups())
    losses = []
    method.train()
    sizes = (2, 4) if name == "region" else (16, 32)
    for step in range(3):
        paddle.seed(step)
        optimizer.set(0.01, 0.04)
        for number in range(accum_steps):
            with distributed.synchronised(method, now=number == accum_steps - 1):
                loss = method(sizes)
                loss.backward()
            losses.append(loss.item())
        losses.append(paddle.rand([1]).item())  # the generator is where it was
        optimizer.step()
        optimizer.clear_grad()
    return losses, {key: value.numpy() for key, value in method.state_dict().items()}, len(counted)


@pytest.mark.smoke
@pytest.mark.parametrize("strided_views", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_losses_weights_and_statistics_are_the_same(name, strided_views):
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    paddle.set_flags({"FLAGS_use_stride_kernel": strided_views})
    try:
        losses, state, calls = train(name)
        found = train(name, True)
    finally:
        paddle.set_flags(before)
    assert found[0] == losses
    assert found[1].keys() == state.keys()
    assert [key for key in state if found[1][key].tobytes() != state[key].tobytes()] == []
    assert found[2] == 2 * calls


@pytest.mark.parametrize(
    ("amount", "interval", "chosen"),
    [(True, 1, 5), (3, 1, 3), (0.5, 1, 2), (0.01, 1, 1), (1.0, 1, 5), (1, 1, 1), (True, 2, 3), (True, 9, 1)],
)
def test_how_many_blocks(amount, interval, chosen):
    method = Squares(VisionTransformer(16, 8, 3, 12, 5, 2))
    assert recompute_blocks(method, amount, interval) == chosen


def test_evaluation_computes_once():
    method = Squares(BACKBONES["vit"]())
    counted = calls_of(method.backbone)
    names = list(method.state_dict())
    recompute_blocks(method, True)
    method.eval()
    method((16,)).backward()
    method.train()
    with paddle.no_grad():
        method((16,))
    assert len(counted) == 2
    assert list(method.state_dict()) == names


def test_blocks_behind_a_frozen_embedding_are_trained():
    """Where no input of a block has a gradient it is kept whole: Paddle would leave its weights without any."""
    method = Squares(BACKBONES["vit"]())
    backbone = method.backbone
    for parameter in (backbone.cls_token, backbone.pos_embed, *backbone.patch_embed.parameters()):
        parameter.stop_gradient = True
    recompute_blocks(method, True)
    method((16,)).backward()
    assert [name for name, p in backbone.blocks.named_parameters() if p.grad is None] == []


class Foreign(nn.Layer):
    """A backbone of a user with Paddle's own batch norm in its blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.LayerList([nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1D(3))])


def frozen():
    backbone = BACKBONES["vit"]()
    for parameter in backbone.parameters():
        parameter.stop_gradient = True
    return backbone


@pytest.mark.parametrize(
    ("backbone", "amount", "message"),
    [
        (Foreign, True, r"blocks.0.1 of Foreign is Paddle's BatchNorm1D, whose running statistics would move twice"),
        (lambda: ResNet((1, 1, 1, 1), False, 8), True, "ResNet has no list of blocks to recompute"),
        (frozen, True, "Squares trains no backbone, so there is nothing to recompute"),
        (BACKBONES["vit"], 4, r"recompute \(4\) is more than the backbone's 3 blocks: true means all"),
    ],
)
def test_what_cannot_be_recomputed(backbone, amount, message):
    config = {"DistributedStrategy": {"recompute": amount}}
    with pytest.raises(ConfigError, match=f"DistributedStrategy.recompute: .*{message}"):
        build.recompute(config, Squares(backbone()))


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


def kept(method):
    """Numbers that the forward keeps for the backward."""
    alive = weakref.WeakSet()

    def pack(tensor):
        holder = Holder(tensor)
        alive.add(holder)
        return holder

    with paddle.autograd.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = method((64,))
    found = sum(holder.tensor.size for holder in alive)
    assert not loss.stop_gradient  # the graph was still there. No backward: with such hooks Paddle 2.6 waits for ever
    return found


def test_less_is_kept_for_the_backward():
    method = Squares(VisionTransformer(64, 8, 3, 24, 8, 2))
    method.train()
    before = kept(method)
    recompute_blocks(method, True)
    assert kept(method) < before / 3
