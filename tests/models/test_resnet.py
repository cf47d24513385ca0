"""The residual networks against recorded outputs of torchvision's."""

import functools
import json
import re

import numpy as np
import paddle
import pytest

from passl.models import DINO, DINOHead, LinearProbe, ResNet
from passl.models.layers import BatchNorm2D
from passl.registry import BACKBONES
from tests.models.weights import (
    assert_close,
    assert_gradients_reach_everything,
    generated_state,
    load,
    load_refgen,
    torch_name,
)

tiny = functools.partial(ResNet, depths=(1, 2, 1, 1), width=4)


def recorded_models(reference, pattern: str) -> list:
    """(key, model's name, height, width) of the recordings whose key matches, e.g. resnet50/96x96."""
    recorded = np.load(reference / "fullsize_outputs.npz")
    matches = [re.fullmatch(pattern, key) for key in recorded.files]
    return [(match[0], match[1], int(match[2]), int(match[3])) for match in matches if match]


def generated_model(reference, name: str, salt: str):
    model = BACKBONES.get(name)()
    load(model, generated_state(load_refgen(reference), model, salt))
    return model


@pytest.mark.parametrize("suffix", ["", "_f64"])
def test_outputs(reference, suffix, request):
    if suffix:
        request.getfixturevalue("float64")
    recorded = np.load(reference / "fullsize_outputs.npz")
    salt = str(recorded["salt"])
    keys = recorded_models(reference, rf"(resnet\d+)/(\d+)x(\d+){suffix}")
    assert keys
    for name in sorted({key[1] for key in keys}):
        model = generated_model(reference, name, salt)
        model.eval()
        for key, _, height, width in [key for key in keys if key[1] == name]:
            x = load_refgen(reference).image(f"{salt}{name}:{height}x{width}", (len(recorded[key]), 3, height, width))
            with paddle.no_grad():
                output = model(paddle.to_tensor(x.astype(paddle.get_default_dtype())))
            assert output.shape[1] == model.embed_dim
            assert_close(output, recorded[key], 1e-10 if suffix else 5e-5, key)


@pytest.mark.smoke
def test_training_and_its_running_statistics(reference):
    recorded = np.load(reference / "fullsize_outputs.npz")
    salt = str(recorded["salt"])
    keys = recorded_models(reference, r"(resnet\d+)/train_forward_(\d+)x(\d+)")
    assert keys
    for key, name, height, width in keys:
        model = generated_model(reference, name, salt)
        model.train()
        x = load_refgen(reference).image(f"{salt}{name}:train", (len(recorded[key]), 3, height, width))
        with paddle.no_grad():
            assert_close(model(paddle.to_tensor(x)), recorded[key], 5e-5, key)
        state = {f"{name}/after_train/{torch_name(own)}": value for own, value in model.state_dict().items()}
        statistics = [key for key in recorded.files if key.startswith(f"{name}/after_train/")]
        assert statistics
        for key in statistics:
            assert_close(state[key], recorded[key], 5e-5, key)


@pytest.mark.smoke
def test_names_and_shapes(reference):
    path = reference / "names_shapes.json"
    if not path.exists():
        pytest.skip("this recording has no names_shapes.json")
    recorded = json.loads(path.read_text())
    tags = [tag for tag in recorded if tag.startswith("resnet")]
    assert tags
    for tag in tags:
        model = BACKBONES.get(tag.split("_")[0])()
        ours = [[torch_name(name), tensor.shape] for name, tensor in model.state_dict().items()]
        # Paddle has no count of the batches; nothing reads it where the momentum is a number.
        assert ours == [entry for entry in recorded[tag] if not entry[0].endswith("num_batches_tracked")], tag


@pytest.mark.parametrize(
    ("name", "embed_dim", "parameters"),
    # Published numbers of parameters, less the classifier's embed_dim*1000 + 1000.
    [
        ("resnet18", 512, 11_689_512 - 513_000),
        ("resnet34", 512, 21_797_672 - 513_000),
        ("resnet50", 2048, 25_557_032 - 2_049_000),
        ("resnet101", 2048, 44_549_160 - 2_049_000),
        ("resnet152", 2048, 60_192_808 - 2_049_000),
    ],
)
def test_sizes(name, embed_dim, parameters):
    model = BACKBONES.get(name)()
    assert model.embed_dim == embed_dim
    assert sum(p.size for p in model.parameters() if not p.stop_gradient) == parameters


@pytest.mark.smoke
def test_initialisation():
    """As torchvision's: Kaiming normal by fan out, batch norms 1 and 0."""
    paddle.seed(0)
    for name, value in ResNet(depths=(1, 1, 1, 1), width=32).state_dict().items():
        value = value.numpy()
        if value.ndim == 4:
            expected = np.sqrt(2.0 / (value.shape[0] * value.shape[2] ** 2))
            assert abs(value.std() / expected - 1.0) < 5.0 / np.sqrt(2 * value.size), name
            assert abs(value.mean()) < 5.0 * expected / np.sqrt(value.size), name
        else:
            assert (value == float(name.endswith(("weight", "_variance")))).all(), name


@pytest.mark.smoke
@pytest.mark.parametrize("bottleneck", [True, False])
def test_any_size_and_channels(bottleneck):
    model = tiny(bottleneck=bottleneck, in_chans=5)
    model.eval()
    for height, width in [(32, 96), (33, 47), (7, 1)]:
        x = paddle.randn([2, 5, height, width])
        features = model.feature_map(x)
        assert features.shape == [2, model.embed_dim, -(-height // 32), -(-width // 32)]
        assert_close(model(x), features.mean([2, 3]), 1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("bottleneck", [True, False])
def test_gradients_reach_everything(bottleneck):
    paddle.seed(0)
    model = tiny(bottleneck=bottleneck)
    x = paddle.randn([2, 3, 64, 96])
    x.stop_gradient = False
    (model(x) ** 2).sum().backward()
    assert_gradients_reach_everything(model, x)


@pytest.mark.smoke
def test_classifier():
    """As torchvision's: `fc`, initialised as PyTorch's Linear, after the features."""
    paddle.seed(0)
    model = tiny(num_classes=1000)
    features = tiny()
    state = model.state_dict()
    assert list(state)[-2:] == ["fc.weight", "fc.bias"]
    features.set_state_dict({name: state[name] for name in features.state_dict()})
    bound = model.embed_dim**-0.5
    assert state["fc.weight"].shape == [model.embed_dim, 1000]
    for name in ("fc.weight", "fc.bias"):
        assert 0.98 * bound < state[name].abs().max().item() <= bound
        assert abs(state[name].numpy().std() / bound - 3**-0.5) < 0.03
    model.eval()
    features.eval()
    x = paddle.randn([2, 3, 32, 32])
    expected = features(x).numpy() @ state["fc.weight"].numpy() + state["fc.bias"].numpy()
    assert_close(model(x), expected, 1e-5)


@pytest.mark.smoke
def test_batch_norm(float64):
    """Running statistics by PyTorch's rule (unbiased variance); in eval mode they are used and stay."""
    # Not closer than 1e-10: the kernel's epsilon is a float32.
    paddle.seed(0)
    layer = BatchNorm2D(3)
    mean, variance = np.zeros(3), np.ones(3)
    for _ in range(3):
        x = paddle.randn([2, 3, 2, 1]) * 3.0 + 1.0
        values = x.numpy().transpose(1, 0, 2, 3).reshape(3, -1)
        expected = (x.numpy() - values.mean(1)[:, None, None]) / np.sqrt(values.var(1)[:, None, None] + 1e-5)
        assert_close(layer(x), expected, 1e-10)
        mean = 0.9 * mean + 0.1 * values.mean(1)
        variance = 0.9 * variance + 0.1 * values.var(1, ddof=1)
        assert_close(layer._mean, mean, 1e-10)
        assert_close(layer._variance, variance, 1e-10)
    layer.eval()
    expected = (x.numpy() - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
    assert_close(layer(x), expected, 1e-10)
    assert_close(layer._variance, variance, 1e-10)


def test_linear_probe_takes_the_output():
    probe = LinearProbe(tiny, num_classes=3)
    x = paddle.randn([2, 3, 32, 32])
    assert_close(probe.features(x), probe.backbone(x), 0.0)
    assert probe.predict(x).shape == [2, 3]


def test_dino_leaves_the_teacher_its_own_statistics():
    """The moving average is over parameters alone; the teacher's batch norms see the teacher's batches."""
    paddle.seed(0)
    method = DINO(tiny, functools.partial(DINOHead, out_dim=10, hidden_dim=8, bottleneck_dim=6))
    method.train()
    crops = {"global_crops": paddle.randn([4, 3, 32, 32]), "local_crops": paddle.randn([4, 3, 16, 16])}
    method(crops, teacher_temp=0.04)["loss"].backward()
    before = {name: value.numpy().copy() for name, value in method.backbone.state_dict().items()}
    method.after_step(teacher_momentum=0.5)
    student = method.student.backbone.state_dict()
    for name, value in method.backbone.state_dict().items():
        assert (value.numpy() == before[name]).all(), name
        is_statistic = name.endswith(("_mean", "_variance"))
        assert (value.numpy() == student[name].numpy()).all() != is_statistic, name


@pytest.mark.smoke
def test_batch_norms_are_not_regularised():
    """The official rule: decay acts on what has more than one axis and is no bias."""
    method = DINO(tiny, functools.partial(DINOHead, out_dim=10, hidden_dim=8, bottleneck_dim=6, use_bn=True))
    shapes = {id(p): (name, p.ndim) for name, p in method.named_parameters()}
    regularised, rest = ([shapes[id(p)] for p in group["params"]] for group in method.param_groups())
    assert {ndim for _, ndim in regularised} == {4, 2}  # convolutions; the head's layers
    assert {ndim for _, ndim in rest} == {1}
    assert not [name for name, _ in regularised + rest if name.endswith(("_mean", "_variance"))]
    for batch_norm in ("student.backbone.layer1.0.downsample.1", "student.backbone.bn1", "student.head.mlp.1"):
        assert {(f"{batch_norm}.weight", 1), (f"{batch_norm}.bias", 1)} <= set(rest)


@pytest.mark.smoke
def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"depths \(\[3, 4, 6\]\) must be four numbers of blocks, each at least 1"):
        ResNet(depths=(3, 4, 6))
    with pytest.raises(ValueError, match=r"depths \(\[1, 0, 1, 1\]\) must be"):
        ResNet(depths=(1, 0, 1, 1))
    with pytest.raises(ValueError, match=r"num_classes \(-1\) must be at least 0, which means no classifier"):
        ResNet(num_classes=-1)
    with pytest.raises(ValueError, match=r"width \(0\) must be at least 1"):
        ResNet(width=0)
    with pytest.raises(ValueError, match="batch norm needs at least 2 values per channel in training, got 1"):
        tiny()(paddle.zeros([1, 3, 32, 32]))


@pytest.mark.smoke
def test_fresh_batch_norms_have_no_bias_in_evaluation():
    """Paddle's kernel alone is off by 1.2e-7 at a variance of 1, the same way in each layer."""
    layer = BatchNorm2D(64)
    layer.eval()
    x = np.random.default_rng(1).standard_normal((2, 64, 8, 8)).astype(np.float32)
    ratio = layer(paddle.to_tensor(x)).numpy().astype(np.float64) / x * np.sqrt(1 + 1e-5)
    assert abs(ratio.mean() - 1) < 4e-8
