"""All crops in one forward: over packs and by size the numbers, and gradients, of one crop after the other."""

from __future__ import annotations

import functools

import numpy as np
import paddle
import pytest

from passl.engine.recompute import recompute_blocks
from passl.models import RegionTransformer, ResNet, VisionTransformer, packs
from passl.models.method import Method
from passl.models.multi_crop import MultiCropNetwork
from passl.models.stochastic_depth import DropPath

# Height and width in patches, and how many. Not square, equal, of equal length but not of equal size, one, apart.
SIZES = ((4, 4, 3), (4, 4, 2), (2, 3, 4), (3, 2, 2), (1, 1, 1), (4, 4, 1))
BACKBONES = {
    "plain": functools.partial(VisionTransformer, 32, 8, 3, 12, 3, 2, init_std=0.2),
    "dinov2": functools.partial(
        VisionTransformer,
        32,
        8,
        3,
        12,
        3,
        2,
        init_std=0.2,
        num_register_tokens=2,
        layer_scale=0.5,
        ffn="swiglu",
        mask_token=True,
        pos_embed_mode="antialias",
    ),
    "region": functools.partial(RegionTransformer, 3, 4, 12, 2, 2, init_std=0.2),
}


@pytest.fixture(params=["float32", "float64"])
def tolerance(request):
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(request.param)
    yield {"float32": 1e-6, "float64": 1e-12}[request.param]
    paddle.set_default_dtype(before)


def made(name, sizes):
    """A backbone, crops, and masks where the backbone can hide patches."""
    paddle.seed(3)
    model = BACKBONES[name]()
    crops = [paddle.randn([count, 3, h * model.patch_size, w * model.patch_size]) for h, w, count in sizes]
    masks = [None] * len(crops)
    if getattr(model, "mask_token", None) is not None:
        model.mask_token.stop_gradient = False
        masks = [None if index % 2 else paddle.rand([n, h * w]) < 0.5 for index, (h, w, n) in enumerate(sizes)]
    return model, crops, masks


def gradients(model, outputs):
    """Of a loss that is another function of each output."""
    paddle.seed(4)
    sum((output * paddle.randn(output.shape)).sum() for output in outputs).backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient}
    model.clear_gradients()
    return found


def assert_same(actual, expected, tolerance, factor=1.0):
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected):
        assert one.shape == other.shape
        scale = max(1.0, float(np.abs(np.asarray(other)).max()))
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= tolerance * factor * scale


@pytest.mark.smoke
@pytest.mark.parametrize("packed", [None, False, True])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1], SIZES[:2], SIZES[2:4]])
@pytest.mark.parametrize("name", BACKBONES)
def test_all_tokens_of_all_crops(name, sizes, packed, tolerance):
    model, crops, masks = made(name, sizes)
    alone = [model.forward_crops([crop], [mask])[0] for crop, mask in zip(crops, masks)]
    together = model.forward_crops(crops, masks, packed)
    assert_same(together, alone, tolerance)
    expected, found = gradients(model, alone), gradients(model, together)
    # The sums of gradients over all tokens are taken in another order.
    assert_same(list(found.values()), list(expected.values()), tolerance, 4)
    if masks[0] is None:
        assert_same([x[:, 0] for x in together], [model(crop) for crop in crops], tolerance)
    else:
        unhidden = model.forward_crops(crops, None, packed)
        assert_same([x[:, 0] for x in unhidden], [model(crop) for crop in crops], tolerance)


@pytest.mark.smoke
@pytest.mark.parametrize("packed", [None, False, True])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1]])
@pytest.mark.parametrize("name", BACKBONES)
def test_cls_of_all_crops(name, sizes, packed, tolerance):
    model, crops, _ = made(name, sizes)
    if name == "dinov2":
        model.mask_token.stop_gradient = True
    alone = paddle.concat([model(crop) for crop in crops])
    together = model.cls_of_crops(crops, packed)
    assert_same([together], [alone], tolerance)
    expected, found = gradients(model, [alone]), gradients(model, [together])
    assert_same(list(found.values()), list(expected.values()), tolerance, 4)


def test_no_crops_and_wrong_number_of_masks():
    model, crops, masks = made("dinov2", SIZES[:2])
    assert model.forward_crops([]) == []
    with pytest.raises(ValueError, match=r"masks \(1\) must be as many as crops \(2\)"):
        model.forward_crops(crops, masks[:1])


@pytest.mark.smoke
@pytest.mark.parametrize("cls_only", [False, True])
def test_arguments_of_the_kernel_for_sequences_of_any_lengths(cls_only, monkeypatch):
    """A stand-in that goes by the offsets gives what attention by size gives."""
    calls = []

    def kernel(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
        calls.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale))
        starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        mixed = []
        for start, end, key_start, key_end in zip(starts, starts[1:], key_starts, key_starts[1:]):
            scores = paddle.einsum("qhd,khd->hqk", query[start:end], key[key_start:key_end]) * scale
            mixed.append(paddle.einsum("hqk,khd->qhd", paddle.nn.functional.softmax(scores), value[key_start:key_end]))
        return paddle.concat(mixed), None

    model, crops, _ = made("dinov2", SIZES[1:5])
    forward = functools.partial(model.cls_of_crops if cls_only else model.forward_crops, crops)
    by_size = forward(packed=False)
    monkeypatch.setattr(packs.functional, "has_flash_attention", lambda x: True)
    monkeypatch.setattr(packs.flash_attention, "flash_attn_unpadded", kernel)
    by_kernel = forward(packed=True)
    assert_same(list(by_kernel), list(by_size), 1e-6)
    assert len(calls) == 3
    lengths = [19] * 2 + [9] * 6 + [4]
    for block, (queries, keys, longest_query, longest_key, scale) in enumerate(calls):
        only_cls = cls_only and block == 2
        assert queries.dtype == keys.dtype == paddle.int32
        assert keys.tolist() == np.cumsum([0, *lengths]).tolist()
        assert queries.tolist() == (list(range(10)) if only_cls else keys.tolist())
        assert (longest_query, longest_key) == (1 if only_cls else 19, 19)
        assert scale == 6**-0.5


def test_samples_of_a_pack_are_dropped_by_themselves():
    drop_path = DropPath(0.4)
    sizes = ((500, 3), (1500, 2))
    paddle.seed(0)
    batches = packs.unpack(drop_path(paddle.ones([4500, 2]), sizes), sizes)
    for batch in batches:
        samples = batch.numpy().reshape(batch.shape[0], -1)
        assert (samples == samples[:, :1]).all()
        assert np.allclose(np.unique(samples), [0.0, 1 / 0.6])
        assert abs((samples[:, 0] > 0).mean() - 0.6) < 5 * (0.24 / len(samples)) ** 0.5
    drop_path.eval()
    assert (drop_path(paddle.ones([4500, 2]), sizes).numpy() == 1).all()


class OfAllCrops(Method):
    def __init__(self, way, packed):
        super().__init__()
        self.backbone = VisionTransformer(32, 8, 3, 12, 3, 2, drop_path_rate=0.3, drop_path_subset=True)
        self.way = way
        self.packed = packed

    def forward(self, crops):
        outputs = getattr(self.backbone, self.way)(crops, packed=self.packed)
        return sum(x.square().sum() for x in outputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", ["forward_crops", "cls_of_crops"])
def test_recomputed_blocks(way, packed):
    """The same gradients to the last bit, and every block runs twice."""
    results = []
    for recompute in (False, True):
        paddle.seed(1)
        method = OfAllCrops(way, packed)
        counted = []
        method.backbone.blocks[1].attn.qkv.register_forward_post_hook(lambda *_, calls=counted: calls.append(1))
        if recompute:
            recompute_blocks(method, True)
        method.train()
        crops = [paddle.randn([4, 3, 32, 32]), paddle.randn([6, 3, 16, 16])]
        method(crops).backward()
        results.append([p.grad.numpy().tobytes() for p in method.parameters() if p.grad is not None])
        batches = 1 if packed else 2
        assert len(counted) == (2 * batches if recompute else batches)
    assert results[0] == results[1]


class Mean(VisionTransformer):
    """Somebody's own features."""

    def forward(self, images):
        return self.forward_crops([images])[0].mean(1)


@pytest.mark.parametrize(
    "backbone",
    [
        functools.partial(VisionTransformer, 16, 8, 3, 12, 2, 2),
        functools.partial(Mean, 16, 8, 3, 12, 2, 2),
        functools.partial(ResNet, (1, 1, 1, 1), width=4),
    ],
)
@pytest.mark.parametrize("hooked", [False, True])
def test_network_over_crops(backbone, hooked):
    """The features are those of the backbone's own forward, which is called where there are hooks to see it."""
    paddle.seed(0)
    network = MultiCropNetwork(backbone(), paddle.nn.Identity())
    network.eval()
    crops = [paddle.randn([2, 3, 16, 16]), paddle.randn([1, 3, 16, 16]), paddle.randn([3, 3, 8, 8])]
    expected = paddle.concat([network.backbone(crop) for crop in crops])
    seen = []
    if hooked:
        network.backbone.register_forward_post_hook(lambda layer, inputs, output: seen.append(output.shape))
    assert_same([network(crops)], [expected], 1e-6)
    assert [shape[0] for shape in seen] == ([3, 3] if hooked else [])


class OwnBlock(paddle.nn.Layer):
    def forward(self, x, mask=None):
        return x + 1.0


class OwnAttention(paddle.nn.Layer):
    def forward(self, x, mask):
        return x.mean(1, keepdim=True).expand_as(x)


class OwnMlp(paddle.nn.Layer):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)  # of all tokens


@pytest.mark.parametrize("own", [OwnBlock, OwnAttention, OwnMlp])
def test_blocks_of_somebodys_own(own):
    backbone = VisionTransformer(16, 8, 3, 12, 2, 2)
    places = {OwnBlock: (backbone.blocks, "1"), OwnAttention: (backbone.blocks[1], "attn")}
    setattr(*places.get(own, (backbone.blocks[1], "mlp")), own())
    network = MultiCropNetwork(backbone, paddle.nn.Identity())
    crops = [paddle.randn([2, 3, 16, 16]), paddle.randn([3, 3, 8, 8])]
    expected = [backbone.norm(_through(backbone, crop)) for crop in crops]
    assert_same(backbone.forward_crops(crops), expected, 1e-6)
    assert_same([network(crops)], [paddle.concat([tokens[:, 0] for tokens in expected])], 1e-6)


def _through(backbone, images):
    x = backbone.prepare_tokens(images)
    for block in backbone.blocks:
        x = block(x)
    return x


def test_the_last_block_computes_the_cls_alone(monkeypatch):
    network = MultiCropNetwork(VisionTransformer(16, 8, 3, 12, 2, 2), paddle.nn.Identity())
    tokens = []
    linear = packs.functional.linear
    layers = {id(network.backbone.blocks[index].mlp.fc1.weight): index for index in range(2)}

    def counting(x, weight, bias):
        if id(weight) in layers:
            tokens.append((layers[id(weight)], x.shape[1]))
        return linear(x, weight, bias)

    monkeypatch.setattr(packs.functional, "linear", counting)
    network([paddle.randn([2, 3, 16, 16]), paddle.randn([3, 3, 8, 8])])
    assert tokens == [(0, 5), (1, 1), (0, 2), (1, 1)]
