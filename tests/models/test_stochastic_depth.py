"""Stochastic depth on subsets of samples: what is left out is not computed, and on average nothing changes."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl.models import VisionTransformer, dinov2_vit_large, packs
from passl.models.blocks import Block
from passl.models.stochastic_depth import DropPath, SubsetDropPath
from passl.models.vision_transformer import TokenTransformer

RATE = 0.4
KEPT = {1: 1, 2: 1, 5: 3, 8: 4, 10: 6}  # max(int(B * 0.6), 1)


@pytest.fixture
def double():
    before = paddle.get_default_dtype()
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype(before)


def block(subset=True, rate=RATE):
    layer = Block(12, 3, drop_path_rate=rate, init_std=0.3, layer_scale=0.5, drop_path_subset=subset)
    layer.train()
    return layer


def dense(layer, x, mask, drawn):
    """The block with both branches computed for all samples, and those not drawn multiplied by 0."""
    size = x.shape[0]
    chosen = [paddle.zeros([size, 1, 1]) for _ in drawn]
    for factors, kept in zip(chosen, drawn):
        factors[kept] = size / len(kept)
    x = x + chosen[0] * layer.ls1(layer.attn(layer.norm1(x), mask))
    return x + chosen[1] * layer.ls2(layer.mlp(layer.norm2(x)))


def given_permutations(monkeypatch, permutations):
    """paddle.randperm gives these, in this order."""
    coming = iter(permutations)
    monkeypatch.setattr(paddle, "randperm", lambda size: paddle.to_tensor(next(coming)))


@pytest.mark.smoke
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("batch", KEPT)
def test_values_and_gradients(batch, cls_only, masked, double, monkeypatch):
    """Those of the dense formulation with the same subset, for tokens and weights."""
    paddle.seed(0)
    layer = block()
    x = paddle.randn([batch, 4, 12])
    x.stop_gradient = False
    mask = paddle.ones([batch, 4])
    mask[:, 2] = 0.0 if masked else 1.0
    permutations = [np.random.default_rng(seed).permutation(batch) for seed in range(2)]
    expected = dense(layer, x, mask, [p[: KEPT[batch]] for p in permutations])
    given_permutations(monkeypatch, permutations)
    y = layer(x, mask if masked else None, None, cls_only)
    expected = expected[:, :1] if cls_only else expected
    assert y.shape == expected.shape
    assert np.abs(y.numpy() - expected.numpy()).max() < 1e-12
    gradients = []
    for output in (y, expected):
        (output * paddle.arange(output.size, dtype="float64").reshape(output.shape).sin()).sum().backward()
        gradients.append([x.grad.numpy(), *(p.grad.numpy() for p in layer.parameters())])
        x.clear_gradient()
        layer.clear_gradients()
    for one, other in zip(*gradients):
        assert np.abs(one - other).max() < 1e-11


@pytest.mark.smoke
@pytest.mark.parametrize("cls_only", [False, True])
def test_packs(cls_only, double, monkeypatch):
    """Of each batch in a pack a subset of its own."""
    paddle.seed(0)
    layer = block()
    batches = [paddle.randn([5, 4, 12]), paddle.randn([8, 3, 12]), paddle.randn([1, 2, 12])]
    draws = [[np.random.default_rng(seed).permutation(len(x)) for x in batches] for seed in range(2)]
    expected = []
    for number, x in enumerate(batches):
        y = dense(layer, x, None, [draw[number][: KEPT[len(x)]] for draw in draws])
        expected.append(y[:, :1] if cls_only else y)
    given_permutations(monkeypatch, draws[0] + draws[1])
    x, sizes = packs.pack(batches)
    y = layer(x, None, sizes, cls_only)
    assert np.abs(y.numpy() - packs.pack(expected)[0].numpy()).max() < 1e-12


@pytest.mark.smoke
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_dropped_is_not_computed(packed):
    """Both branches of every block see max(int(B * (1 - rate)), 1) samples of each batch."""
    model = VisionTransformer(16, 8, 3, 12, 3, 2, drop_path_rate=RATE, drop_path_uniform=True, drop_path_subset=True)
    model.train()
    rows = []
    for layer in model.blocks:
        for part in (layer.norm1, layer.attn.qkv, layer.norm2, layer.mlp.fc1):
            part.register_forward_post_hook(lambda layer, inputs, output: rows.append(output.size // output.shape[-1]))
    crops = [paddle.randn([10, 3, 16, 16]), paddle.randn([5, 3, 8, 8])]
    model.forward_crops(crops, packed=packed)
    tokens = [KEPT[10] * 5, KEPT[5] * 2]
    assert rows == ([sum(tokens)] * 12 if packed else [tokens[0]] * 12 + [tokens[1]] * 12)


@pytest.mark.smoke
def test_expectation_and_independence_of_draws():
    """On average the whole branch is added; every sample is kept equally often, as its neighbour is or not."""
    drop_path = SubsetDropPath(RATE)
    size, draws = 5, 3000
    x = paddle.arange(size, dtype="float32").unsqueeze(1)
    paddle.seed(0)
    added = []
    for _ in range(draws):
        y = drop_path.add(x, None, lambda x, mask, sizes: 1.0 + x, x, None, None)
        added.append((y - x).numpy()[:, 0])
    added = np.array(added) / np.arange(1, size + 1)
    share = KEPT[size] / size
    assert np.allclose(np.unique(added.round(5)), [0.0, 1 / share], atol=1e-5)
    deviation = ((1 / share - 1) / draws) ** 0.5
    assert (np.abs(added.mean(0) - 1.0) < 4.5 * deviation).all()
    together = ((added[:, 0] > 0) & (added[:, 1] > 0)).mean()
    expected = share * (KEPT[size] - 1) / (size - 1)
    assert abs(together - expected) < 4.5 * (expected * (1 - expected) / draws) ** 0.5


def test_the_whole_network_on_average():
    """Over many draws, dropped paths and subsets have the same mean; with one block it is not far from no dropping."""
    paddle.seed(0)
    model = VisionTransformer(16, 8, 3, 12, 1, 2, drop_path_rate=RATE, drop_path_uniform=True, drop_path_subset=True)
    images = paddle.randn([1, 3, 16, 16]).expand([1000, -1, -1, -1])
    means = []
    with paddle.no_grad():
        for subset in (True, False):
            model.blocks[0].drop_path = (SubsetDropPath if subset else DropPath)(RATE)
            model.train()
            samples = model(images).numpy()
            means.append((samples.mean(0), samples.std(0) / 1000**0.5))
    (subset, error), (dropped, other_error) = means
    assert (error > 0).all()
    assert (np.abs(subset - dropped) < 5 * np.hypot(error, other_error)).all()


@pytest.mark.smoke
def test_evaluation_and_rate_zero():
    paddle.seed(0)
    model = VisionTransformer(16, 8, 3, 12, 2, 2, drop_path_rate=RATE, drop_path_subset=True)
    plain = VisionTransformer(16, 8, 3, 12, 2, 2)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.set_state_dict(model.state_dict())
    images = paddle.randn([6, 3, 16, 16])
    model.eval()
    expected = plain(images).numpy()
    assert (model(images).numpy() == expected).all()
    model.train()
    assert (model(images).numpy() != expected).any()
    for layer in model.blocks:
        layer.drop_path.rate = 0.0
    assert (model(images).numpy() == expected).all()


@pytest.mark.smoke
def test_export(tmp_path):
    """A static program of a network that was trained so."""
    paddle.seed(0)
    model = VisionTransformer(16, 8, 3, 12, 2, 2, drop_path_rate=RATE, drop_path_subset=True)
    model.train()
    images = paddle.randn([3, 3, 16, 16])
    model(images).sum().backward()
    model.eval()
    expected = model(images).numpy()
    spec = paddle.static.InputSpec([None, 3, 16, 16], "float32")
    paddle.jit.save(model, str(tmp_path / "model"), input_spec=[spec])
    assert np.abs(paddle.jit.load(str(tmp_path / "model"))(images).numpy() - expected).max() < 1e-6


@pytest.mark.smoke
def test_draws_come_from_the_generator_of_paddle():
    model = VisionTransformer(16, 8, 3, 12, 2, 2, drop_path_rate=RATE, drop_path_subset=True)
    model.train()
    images = paddle.randn([6, 3, 16, 16])
    results = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        results.append(model(images).numpy().tobytes())
    assert results[0] == results[1] != results[2]


def test_rates(monkeypatch):
    def rates(**arguments):
        model = VisionTransformer(16, 8, 3, 12, 3, 2, drop_path_rate=RATE, **arguments)
        return [layer.drop_path.rate for layer in model.blocks]

    assert np.allclose(rates(), [0.0, 0.2, 0.4])
    assert np.allclose(rates(drop_path_uniform=True), [0.4, 0.4, 0.4])
    whole = TokenTransformer._build
    monkeypatch.setattr(TokenTransformer, "_build", lambda self, *sizes: whole(self, sizes[0], 16, 2, *sizes[3:]))
    arguments = {"drop_path_rate": 0.3, "drop_path_uniform": True, "drop_path_subset": True, "layer_scale": 1e-5}
    model = dinov2_vit_large(img_size=28, num_register_tokens=4, ffn="mlp", **arguments)
    for layer in model.blocks:
        assert isinstance(layer.drop_path, SubsetDropPath)
        assert layer.drop_path.rate == 0.3
