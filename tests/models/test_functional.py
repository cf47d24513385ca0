"""The operations made for CPUs have the right values and gradients."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from passl.models import RegionTransformer, ResNet, VisionTransformer, XCiT, functional
from tests.models.weights import assert_close

DINOV2 = {
    "num_register_tokens": 2,
    "layer_scale": 1.0,
    "ffn": "swiglu",
    "mask_token": True,
    "pos_embed_mode": "antialias",
}


def check(ours, theirs, shapes, trainable=None, tolerance=1e-10) -> None:
    """Equal outputs and equal gradients, for the inputs that have one."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in shapes]
    trainable = [True] * len(shapes) if trainable is None else trainable
    results = []
    for function in (ours, theirs):
        inputs = [paddle.to_tensor(v, stop_gradient=not needs) for v, needs in zip(values, trainable)]
        output = function(*inputs)
        cotangent = np.cos(np.arange(np.prod(output.shape))).reshape(output.shape)
        (output * paddle.to_tensor(cotangent)).sum().backward()
        results.append([output.detach()] + [x.grad for x in inputs])
    for index, (our, their) in enumerate(zip(*results)):
        assert (our is None) == (their is None), index
        if our is not None:
            assert_close(our, their, tolerance, str(index))


@pytest.mark.parametrize("shape", [[7, 5], [2, 3, 5]])
@pytest.mark.parametrize("trainable", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_linear(shape, trainable):
    check(functional.linear, F.linear, [shape, [5, 4], [4]], [bool(flag) for flag in trainable])


def test_linear_without_bias():
    check(lambda x, w: functional.linear(x, w, None), F.linear, [[2, 3, 5], [5, 4]])


@pytest.mark.parametrize("shape", [[7, 6], [2, 3, 6]])
@pytest.mark.parametrize("trainable", [(1, 1, 1), (0, 1, 1), (1, 0, 0)])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 50.0)])
def test_layer_norm(shape, trainable, scale, offset):
    """Against the formula: with a frozen weight Paddle's own kernel leaves the weight out of the gradient of x."""
    epsilon = 2.0**-18  # Paddle rounds it to float32

    def formula(x, weight, bias):
        centered = x - x.mean(-1, keepdim=True)
        return centered / paddle.sqrt((centered * centered).mean(-1, keepdim=True) + epsilon) * weight + bias

    check(
        lambda x, w, b: functional.layer_norm(x * scale + offset, w, b, epsilon),
        lambda x, w, b: formula(x * scale + offset, w, b),
        [shape, shape[-1:], shape[-1:]],
        [bool(flag) for flag in trainable],
    )


@pytest.mark.parametrize("trainable", [(1, 1), (0, 1), (1, 0)])
def test_scale(trainable):
    check(functional.scale, lambda x, f: x * f, [[2, 3, 5], [5]], [bool(flag) for flag in trainable])


def test_attention_mask():
    """Equals attention among the tokens that are left, for values and gradients."""
    left = [0, 2, 3]

    def among_the_left(query, key, value):
        return functional.attention(query, key[:, left], value[:, left])

    mask = paddle.to_tensor([[1, 0, 1, 1, 0]] * 2)
    check(lambda q, k, v: functional.attention(q, k, v, mask), among_the_left, [[2, 5, 3, 4]] * 3)


def test_patch_embed():
    check(
        functional.patch_embed,
        lambda x, w, b: F.conv2d(x, w, b, stride=4).flatten(2).transpose([0, 2, 1]),
        [[2, 3, 8, 12], [5, 3, 4, 4], [5]],
    )


def test_cross_entropy():
    targets = F.softmax(paddle.to_tensor(np.random.default_rng(1).normal(size=[4, 9])), axis=-1) * 2.0
    check(
        lambda x: functional.cross_entropy(x, targets),
        lambda x: -(targets * (x - paddle.logsumexp(x, -1, keepdim=True))).sum(-1),
        [[4, 9]],
    )


@pytest.mark.parametrize("trainable", [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 1)])
def test_weight_norm_linear(trainable):
    check(
        functional.weight_norm_linear,
        lambda x, v, g: paddle.matmul(x, v / paddle.sqrt((v * v).sum(0)) * g),
        [[4, 3], [3, 9], [9]],
        [bool(flag) for flag in trainable],
    )


def test_sums():
    check(functional.sum_rows, lambda x: x.sum(0), [[4, 9]])
    check(functional.sum_columns, lambda x: x.sum(1, keepdim=True), [[4, 9]])


@pytest.mark.parametrize("shape", [[7, 5], [2, 3, 4, 5]])
def test_normalize(shape):
    check(functional.normalize, lambda x: x / x.square().sum(-1, keepdim=True).sqrt(), [shape])


def test_normalize_zeros():
    x = paddle.to_tensor([[0.0, 0.0], [3.0, 4.0]], stop_gradient=False)
    y = functional.normalize(x)
    y.sum().backward()
    assert_close(y.detach(), [[0.0, 0.0], [0.6, 0.8]], 1e-6)
    assert np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: VisionTransformer(16, 8, embed_dim=6, depth=2, num_heads=2), (16, 24)),
        (lambda: VisionTransformer(16, 8, embed_dim=6, depth=2, num_heads=2, **DINOV2), (16, 24)),
        (lambda: RegionTransformer(3, embed_dim=6, depth=2, num_heads=2), (16, 24)),
        (lambda: XCiT(8, embed_dim=8, depth=1, num_heads=2), (16, 24)),
        (lambda: ResNet((1, 1, 1, 1), width=4), (None, None)),
    ],
    ids=["VisionTransformer", "DINOv2", "RegionTransformer", "XCiT", "ResNet"],
)
def test_networks_can_be_exported(tmp_path, build, size):
    """Traced programs hold Paddle's own operations, and any number of images; convnets take any size."""
    model = build()
    model.eval()
    paddle.jit.save(model, str(tmp_path / "model"), input_spec=[paddle.static.InputSpec([None, 3, *size])])
    loaded = paddle.jit.load(str(tmp_path / "model"))
    x = paddle.randn([3, 3, 16, 24])
    assert_close(loaded(x).detach(), model(x).detach(), 5e-6)
