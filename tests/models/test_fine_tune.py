"""Fine-tuning: its loss against the textbook formulas, what is trained at which rate, and mixing."""

import functools

import numpy as np
import paddle
import pytest

from passl.models import FineTune, LinearProbe, VisionTransformer, resnet18, xcit_nano_12_p16
from passl.models.fine_tune import mixed_cross_entropy
from passl.models.mixing import Mixing, cut_box
from tests.models.weights import assert_close


def vit(**arguments) -> VisionTransformer:
    return VisionTransformer(16, 8, embed_dim=6, depth=3, num_heads=2, **arguments)


def batch(size: int = 4, num_classes: int = 7) -> dict:
    return {"image": paddle.randn([size, 3, 16, 16]), "label": paddle.arange(size) % num_classes}


def soft_cross_entropy(logits: np.ndarray, target: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-(target * log_p).sum(1).mean())


@pytest.mark.smoke
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.0])
def test_loss_is_cross_entropy_against_the_mixed_smoothed_target(smoothing, share):
    """As timm's mixup_target: off = s/K, on = 1 - s + s/K."""
    rng = np.random.default_rng(0)
    logits = 30 * rng.standard_normal((5, 4)).astype("float32")  # far beyond the clamp of Paddle's log_softmax
    label, other = rng.integers(0, 4, 5), rng.integers(0, 4, 5)
    target = share * np.eye(4)[label] + (1 - share) * np.eye(4)[other]
    target = target * (1 - smoothing) + smoothing / 4
    loss = mixed_cross_entropy(*map(paddle.to_tensor, (logits, label, other)), share, smoothing)
    assert loss.item() == pytest.approx(soft_cross_entropy(logits, target), rel=1e-5)


def test_without_mixing_and_smoothing_loss_and_rates_are_those_of_a_probe():
    tuned, probe = FineTune(vit, num_classes=7), LinearProbe(vit, num_classes=7, n_last_blocks=1)
    probe.set_state_dict(tuned.state_dict())
    given = batch()
    expected = probe(given)
    found = tuned(given)
    assert sorted(found) == sorted(expected)
    for name in found:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_all_weights_are_trained():
    tuned = FineTune(functools.partial(vit, drop_path_rate=0.5), num_classes=7, mixup_alpha=1.0, cutmix_alpha=1.0)
    tuned(batch())["loss"].backward()
    names = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert names == {name for name, p in tuned.named_parameters() if not p.stop_gradient}
    assert any(name.startswith("backbone.patch_embed") for name in names)


@pytest.mark.parametrize("backbone", [vit, functools.partial(resnet18), xcit_nano_12_p16])
def test_rates_by_layer(backbone):
    tuned = FineTune(backbone, num_classes=3, layer_decay=0.5)
    shares = tuned.learning_rate_shares()
    assert set(shares) == {name for name, _ in tuned.named_parameters() if name.startswith("backbone.")}
    groups = {id(p): group.get("learning_rate", 1.0) for group in tuned.param_groups() for p in group["params"]}
    rates = {name: groups[id(p)] for name, p in tuned.named_parameters() if not p.stop_gradient}
    assert rates["linear.linear.weight"] == 1.0
    if backbone is vit:
        assert rates["backbone.norm.weight"] == 1.0
        assert rates["backbone.blocks.2.attn.qkv.weight"] == 0.5
        assert rates["backbone.blocks.0.norm1.bias"] == 0.5**3
        assert rates["backbone.cls_token"] == rates["backbone.patch_embed.proj.bias"] == 0.5**4
    assert FineTune(backbone, num_classes=3).learning_rate_shares() == {}


def test_pools():
    x = paddle.randn([2, 3, 16, 24])
    for pool, parts in (("cls", "c"), ("mean", "m"), ("cls+mean", "cm")):
        tuned = FineTune(functools.partial(vit, num_register_tokens=2), num_classes=3, pool=pool)
        tuned.eval()
        tokens = tuned.backbone.get_intermediate_layers(x, 1)[0].numpy()
        expected = {"c": tokens[:, 0], "m": tokens[:, 1:].mean(1)}
        features = tuned.features(x)
        assert_close(features, np.concatenate([expected[part] for part in parts], axis=1), 1e-6)
        assert_close(tuned.backbone_output(features), expected[parts[0]], 1e-6)
        assert tuned.predict(x).shape == [2, 3]
    assert FineTune(resnet18, num_classes=4, pool="mean").predict(paddle.zeros([2, 3, 32, 32])).shape == [2, 4]


# --- mixing ---


def test_mixup():
    images = paddle.randn([3, 2, 4, 5])
    mixed, share = Mixing(mixup_alpha=0.8)(images, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.random()
    assert share == rng.beta(0.8, 0.8)
    assert_close(mixed, share * images.numpy() + (1 - share) * images.numpy()[::-1], 1e-6)


def test_cutmix():
    images = paddle.arange(2 * 3 * 8 * 6).reshape([2, 3, 8, 6]).astype("float32")
    for seed in range(20):
        mixed, share = Mixing(cutmix_alpha=1.0)(images, np.random.default_rng(seed))
        mixed = mixed.numpy()
        is_other = mixed[0] == images.numpy()[1]
        assert ((mixed[0] == images.numpy()[0]) ^ is_other).all()
        assert (is_other == is_other[:1]).all()
        assert share == pytest.approx(1 - is_other[0].mean())
        inside = np.argwhere(is_other[0])
        if len(inside):
            assert np.prod(inside.max(0) - inside.min(0) + 1) == len(inside), "a box"


def test_how_often_batches_are_mixed():
    images = paddle.zeros([2, 1, 8, 8])
    images[0] = 1.0
    mixing, kinds = Mixing(0.8, 1.0, mix_prob=0.6, switch_prob=0.25), []
    for seed in range(600):
        mixed, share = mixing(images, np.random.default_rng(seed))
        values = set(mixed.numpy().ravel().tolist())
        kinds.append("none" if share == 1 and values == {0, 1} else "cut" if values <= {0, 1} else "mix")
    shares = [kinds.count(kind) / 600 for kind in ("mix", "cut")]
    np.testing.assert_allclose(shares, [0.45, 0.15], atol=0.06)


def test_boxes_stay_inside():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        for _ in range(50):
            top, bottom, left, right = cut_box(7, 9, share, rng)
            assert 0 <= top <= bottom <= 7
            assert 0 <= left <= right <= 9


def test_mixing_follows_paddles_seed_and_only_in_training():
    tuned = FineTune(vit, num_classes=7, mixup_alpha=0.8, cutmix_alpha=1.0)
    given, losses = batch(), []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        losses.append(tuned(given)["loss"].item())
    assert losses[0] == losses[1] != losses[2]
    tuned.eval()
    assert tuned(given)["loss"].item() == tuned(given)["loss"].item()


def test_rates_of_a_mixed_batch_are_against_the_larger_share():
    tuned = FineTune(vit, num_classes=5, mixup_alpha=1.0)
    given = {"image": paddle.randn([2, 3, 16, 16]), "label": paddle.to_tensor([1, 3])}
    tuned.predict = lambda images: paddle.to_tensor(10 * np.eye(5, dtype="float32")[[1, 3]])
    found = {(share >= 0.5, tuned(given)["top1"].item()) for share in shares_of_seeds(tuned)}
    assert found == {(True, 100.0), (False, 0.0)}


def shares_of_seeds(tuned):
    mixing = tuned.mixing
    for seed in range(8):
        paddle.seed(seed)
        rng = np.random.default_rng(paddle.randint(0, 2**31 - 1, [1], "int64").item())
        share = mixing(paddle.zeros([2, 3, 16, 16]), rng)[1]
        paddle.seed(seed)
        yield share


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pool": "max"}, r"pool \('max'\) must be 'cls', 'mean' or 'cls\+mean'"),
        ({"label_smoothing": 1.0}, r"label_smoothing \(1.0\) must be at least 0 and below 1"),
        ({"mixup_alpha": -1}, r"mixup_alpha \(-1\) must be a number from 0"),
        ({"cutmix_alpha": float("nan")}, r"cutmix_alpha \(nan\) must be"),
        ({"mix_prob": 2}, r"mix_prob \(2\) must be a probability"),
        ({"layer_decay": 1.5}, r"layer_decay \(1.5\) must be above 0 and at most 1"),
        ({"num_classes": 0}, r"num_classes \(0\) must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        FineTune(vit, **{"num_classes": 3, **arguments})


def test_wrong_batches():
    tuned = FineTune(vit, num_classes=3)
    with pytest.raises(ValueError, match="FineTune needs 'label', and the batch has only image"):
        tuned({"image": paddle.zeros([1, 3, 16, 16])})
    with pytest.raises(ValueError, match="labels must be in 0 to 2 .*from 0 to 3"):
        tuned({"image": paddle.zeros([2, 3, 16, 16]), "label": paddle.to_tensor([0, 3])})
