"""Any model as a backbone: where its features are, how wide they are, and what is said where that cannot be found."""

from __future__ import annotations

import logging

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.vision import models as zoo

from passl import DINOWrapper
from passl.models.resnet import ResNet, resnet18
from passl.models.vision_transformer import VisionTransformer
from passl.models.xcit import xcit_nano_12_p16
from passl.wrapper.adapter import make_features
from passl.wrapper.positions import adapt_positions
from tests.wrapper.small import IMAGE, FixedViT, SmallNet, batch, small_conf, small_wrapper, train

QUICK = {
    "resnet18": 512,
    "mobilenet_v2": 1280,
    "squeezenet1_1": 512,
    "shufflenet_v2_x0_25": 512,
}
WHOLE = {
    **QUICK,
    "resnet34": 512,
    "resnet50": 2048,
    "resnext50_32x4d": 2048,
    "wide_resnet50_2": 2048,
    "vgg11": 4096,
    "vgg16": 4096,
    "alexnet": 256,
    "mobilenet_v1": 1024,
    "mobilenet_v3_small": 1024,
    "mobilenet_v3_large": 1280,
    "densenet121": 1024,
    "googlenet": 1024,
    "inception_v3": 2048,
    "squeezenet1_0": 512,
    "shufflenet_v2_x1_0": 1024,
    "shufflenet_v2_swish": 1024,
}


def check_of_the_zoo(name: str, width: int) -> None:
    model = getattr(zoo, name)()
    wrapper = DINOWrapper(model)
    assert wrapper.embed_dim == width
    wrapper.eval()
    images = batch(2)
    assert wrapper(images, mode="val").shape == [2, width]
    logits = model(paddle.rand([1, 3, 224, 224]))
    assert (logits[0] if isinstance(logits, (list, tuple)) else logits).shape == [1, 1000]


@pytest.mark.parametrize(("name", "width"), QUICK.items())
def test_models_of_paddle_need_no_settings(name, width):
    check_of_the_zoo(name, width)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), WHOLE.items())
def test_all_models_of_paddle_need_no_settings(name, width):
    check_of_the_zoo(name, width)
    wrapper = DINOWrapper(getattr(zoo, name)())
    output, loss = wrapper(paddle.rand([2, 3, 224, 224]))
    assert output.shape == [2, width]
    loss.backward()
    assert np.isfinite(loss.item())


def own(part: str) -> nn.Layer:
    """A model whose forward gives a part of what it computes."""

    class Own(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2D(3, 6, 4, stride=4)
            self.project = nn.Linear(6, 9)
            if part == "cls":
                self.cls_token = self.create_parameter([1, 1, 6])

        def forward(self, images):
            maps = self.stem(images)
            tokens = maps.flatten(2).transpose([0, 2, 1])
            if part == "cls":
                tokens = paddle.concat([self.cls_token.expand([images.shape[0], 1, 6]) + 7.0, tokens], 1)
            given = {
                "maps": maps,
                "tokens": tokens,
                "cls": tokens,
                "vector": self.project(tokens.mean(1)),
                "tuple": (tokens, maps),
                "dict": {"tokens": tokens, "maps": maps},
                "flat": maps.flatten(1),
                "number": tokens.mean(),
            }
            return given[part]

    return Own()


@pytest.mark.smoke
@pytest.mark.parametrize(("part", "width"), [("maps", 6), ("tokens", 6), ("cls", 6), ("vector", 9)])
def test_outputs_of_any_usual_shape_are_features(part, width):
    model = own(part)
    features = make_features(model, small_conf())
    assert features.embed_dim == width
    images = paddle.rand([2, 3, IMAGE, IMAGE])
    raw = model(images).numpy()
    expected = {"maps": (2, 3), "tokens": 1, "cls": 1, "vector": ()}[part]
    expected = raw[:, 0] if part == "cls" else raw.mean(expected) if expected else raw
    np.testing.assert_allclose(features(images).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("tuple", "forward of Own is a tuple of 2, not one Tensor of features: set return_layer to the name"),
        ("dict", "forward of Own is a dict of tokens, maps, not one Tensor of features"),
        ("flat", "they have to be equal: set return_layer to a layer before the flattening, preprocess_func"),
        ("number", "features are [B, D], [B, D, H, W] (their mean is taken)"),
    ],
)
def test_outputs_that_are_no_features_are_errors_that_say_what_to_set(part, message):
    with pytest.raises(ValueError) as caught:
        DINOWrapper(own(part), small_conf())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("part", "function", "width"),
    [("tuple", lambda outputs: outputs[1], 6), ("dict", lambda outputs: outputs["tokens"].max(1), 6)],
)
def test_a_function_of_ones_own_makes_the_features(part, function, width):
    wrapper = DINOWrapper(own(part), small_conf(preprocess_func=function))
    assert wrapper.embed_dim == width
    assert np.isfinite(train(wrapper, 1)[0])


@pytest.mark.parametrize("classifier", ["fc", "head", "heads", "classifier", "_fc"])
@pytest.mark.parametrize("many", [False, True])
def test_classifiers_are_passed_by_only_while_the_wrapper_runs(classifier, many):
    model = SmallNet()
    layer = model.fc
    if many:
        layer = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 10))
    del model.fc
    setattr(model, classifier, layer)
    model.forward = lambda x: getattr(model, classifier)(model.body(model.stem(x)).mean([2, 3]))
    features = make_features(model, small_conf())
    assert features.embed_dim == (5 if many else 12)
    images = paddle.rand([2, 3, IMAGE, IMAGE])
    assert features(images).shape == [2, 5 if many else 12]
    assert model(images).shape == [2, 10]


def test_without_a_classifier_all_of_the_model_counts(caplog):
    model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 7))
    with caplog.at_level(logging.INFO, logger="passl"):
        assert DINOWrapper(model, small_conf()).embed_dim == 7
    assert "features of Sequential: its output, 7 wide" in caplog.text


@pytest.mark.parametrize(
    ("build", "width"),
    [
        (lambda: VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2), 12),
        (resnet18, 512),
        (xcit_nano_12_p16, 128),
    ],
    ids=["ViT", "ResNet", "XCiT"],
)
def test_passls_own_backbones(build, width):
    wrapper = DINOWrapper(build(), small_conf(local_crop_size=32))
    assert wrapper.embed_dim == width
    output, loss = wrapper(batch(2))
    loss.backward()
    assert output.shape == [2, width]


def test_a_paddle_model_is_asked_for_its_network():
    network = SmallNet()
    assert DINOWrapper(paddle.Model(network), small_conf()).model is network


# --- return_layer ---


def test_the_output_of_a_sublayer():
    model = SmallNet()
    features = make_features(model, small_conf(return_layer="stem.0"))
    assert features.embed_dim == 6
    images = paddle.rand([2, 3, IMAGE, IMAGE])
    np.testing.assert_allclose(features(images).numpy(), model.stem[0](images).mean([2, 3]).numpy(), atol=1e-6)


def test_several_sublayers_have_heads_and_centres_of_their_own():
    wrapper = small_wrapper(return_layer=["stem", "body"])
    assert wrapper.embed_dim == 18
    before = [loss.center.numpy() for loss in wrapper.method.dino_loss.losses]
    assert all(np.isfinite(train(wrapper, 2)))
    heads = wrapper.method.student.head.heads
    assert [head.mlp[0].weight.shape[0] for head in heads] == [6, 12]
    for loss, was in zip(wrapper.method.dino_loss.losses, before):
        assert not np.array_equal(loss.center.numpy(), was)
    assert not np.allclose(*(loss.center.numpy() for loss in wrapper.method.dino_loss.losses))


def test_the_loss_of_several_sublayers_is_the_mean_of_their_losses():
    paddle.seed(1)
    wrapper = small_wrapper(return_layer=["stem", "body"])
    method, loss = wrapper.method, wrapper.method.dino_loss
    views = [paddle.rand([8, 3, IMAGE, IMAGE]), paddle.rand([8, 3, 16, 16])]
    features = [method.student.backbone(view) for view in views]
    of_teacher = method.teacher.backbone(views[0])
    expected = []
    for part, begin, end in ((0, 0, 6), (1, 6, 18)):
        logits = method.student.head.heads[part](paddle.concat([one[:, begin:end] for one in features]))
        targets = method.teacher.head.heads[part](of_teacher[:, begin:end])
        expected.append(loss.losses[part](logits, targets, 0.04).item())
    _, found = wrapper({"global_crops": views[0], "local_crops": views[1]})
    np.testing.assert_allclose(found.item(), np.mean(expected), rtol=1e-5)


def test_what_comes_after_the_sublayer_is_not_computed():
    model = SmallNet()
    features = make_features(model, small_conf(return_layer="body"))
    model.fc.forward = lambda x: pytest.fail("the classifier ran")
    assert features(paddle.rand([2, 3, IMAGE, IMAGE])).shape == [2, 12]


def test_of_a_sublayer_that_runs_twice_the_last_time_counts():
    class Twice(SmallNet):
        def forward(self, images):
            return self.body[1](self.body[1](self.stem(images)) - 1.0)

    model = Twice()
    features = make_features(model, small_conf(return_layer="body.1"))
    images = paddle.rand([2, 3, IMAGE, IMAGE])
    np.testing.assert_allclose(features(images).numpy(), model(images).mean([2, 3]).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bodi", "return_layer: SmallNet has no sublayer 'bodi'. Did you mean 'body'?"),
        (["stem", "body.7"], "return_layer: SmallNet has no sublayer 'body.7'. Did you mean 'body.1'?"),
        ("unused", "the forward pass of Part does not call its sublayer 'unused'"),
    ],
)
def test_wrong_sublayers(name, message):
    class Part(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    with pytest.raises(ValueError) as caught:
        DINOWrapper(Part() if name == "unused" else SmallNet(), small_conf(return_layer=name))
    assert message in str(caught.value)


# --- models that do not fit ---


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (SmallNet, "DINOWrapper takes a paddle.nn.Layer or a paddle.Model, not <class"),
        (lambda x: x, "DINOWrapper takes a paddle.nn.Layer"),
    ],
)
def test_what_is_no_model(model, message):
    with pytest.raises(TypeError) as caught:
        DINOWrapper(model, small_conf())
    assert message in str(caught.value)


def test_other_numbers_of_channels():
    with pytest.raises(ValueError) as caught:
        DINOWrapper(SmallNet(channels=1), small_conf())
    assert "SmallNet was tried with global crops of 32 x 32 px, 3 channels" in str(caught.value)
    assert "mean and std (here 3 values) how many channels images have" in str(caught.value)
    wrapper = DINOWrapper(SmallNet(channels=1), small_conf(mean=(0.5,), std=(0.5,)))
    assert np.isfinite(wrapper(batch(channels=1))[1].item())


def test_models_of_one_image_size_say_what_to_set():
    model = nn.Sequential(nn.Conv2D(3, 4, 4, stride=4), nn.Flatten(), nn.Linear(256, 5))
    with pytest.raises(ValueError) as caught:
        DINOWrapper(model, small_conf())
    assert "tried with local crops of 16 x 16 px" in str(caught.value)
    assert "set local_crop_size to global_crop_size, or local_crops_number=0, or return_layer" in str(caught.value)
    for settings in ({"local_crop_size": IMAGE}, {"local_crops_number": 0}, {"return_layer": "0"}):
        assert np.isfinite(train(DINOWrapper(model, small_conf(**settings)), 1)[0])


@pytest.mark.parametrize("sizes", [(32, 16), ((24, 40), (16, 24))])
def test_transformers_of_one_image_size_take_crops_of_others(sizes):
    paddle.seed(0)
    model = FixedViT()
    wrapper = DINOWrapper(model, small_conf(global_crop_size=sizes[0], local_crop_size=sizes[1]))
    assert wrapper.embed_dim == 12
    before = model.pos_embed.numpy()
    assert all(np.isfinite(train(wrapper, 2)))
    assert np.abs(model.pos_embed.numpy() - before).max(-1).all()  # each of them learns
    assert model(paddle.rand([1, 3, 32, 32])).shape == [1, 10]


def test_the_first_embeddings_are_not_taken_for_those_of_a_smaller_image():
    """Many transformers add as many embeddings as there are patches: to a small image the topmost rows of a large."""

    class Cutting(FixedViT):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            del self.head

        def forward(self, images):
            patches = self.patches(images).flatten(2).transpose([0, 2, 1])
            tokens = paddle.concat([self.cls_token.expand([images.shape[0], 1, 12]), patches], axis=1)
            return self.block(tokens + self.pos_embed[:, : tokens.shape[1]])[:, 0]

    model = Cutting()
    features = make_features(model, small_conf())
    crops = paddle.rand([2, 3, 16, 16])
    with adapt_positions(model, (16, 16), (32, 32)):
        expected = model(crops).numpy()
    np.testing.assert_array_equal(features(crops).numpy(), expected)
    assert np.abs(model(crops).numpy() - expected).max() > 1e-3
    # passl's own resizes them by itself, in its own way.
    assert make_features(VisionTransformer(32, 8, 3, 12, 1, 2), small_conf()).reading.positions is None


def test_positions_that_cannot_be_resized_say_what_to_set():
    class Looked(FixedViT):
        def __init__(self) -> None:
            super().__init__()
            del self.pos_embed
            self.pos_embedding = nn.Embedding(17, 12)

        def positions(self):
            return self.pos_embedding(paddle.arange(17)).unsqueeze(0)

    with pytest.raises(ValueError) as caught:
        DINOWrapper(Looked(), small_conf())
    assert "its positions are looked up in a table (pos_embedding). Set local_crop_size=(32, 32)" in str(caught.value)
    assert "or local_crops_number=0" in str(caught.value)
    assert DINOWrapper(Looked(), small_conf(local_crops_number=0)).embed_dim == 12


def test_the_dry_run_leaves_no_trace():
    model = SmallNet()
    model.stem.eval()
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    make_features(model, small_conf())
    assert model.training
    assert not model.stem.training
    assert model.body.training
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors_of_the_model_leave_no_hooks():
    model = SmallNet()
    features = make_features(model, small_conf())
    with pytest.raises((ValueError, RuntimeError)):
        features(paddle.rand([2, 5, IMAGE, IMAGE]))
    assert model(paddle.rand([2, 3, IMAGE, IMAGE])).shape == [2, 10]


def test_other_sides_than_squares():
    wrapper = small_wrapper(global_crop_size=(24, 40), local_crop_size=(12, 20))
    shapes = []
    wrapper.model.stem.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[2:]))
    train(wrapper, 1)
    assert shapes == [[24, 40], [12, 20]]
    assert isinstance(resnet18(), ResNet)


class ByKeyword(SmallNet):
    def forward(self, images):
        return self.fc(input=self.body(self.stem(images)).mean([2, 3]))


class Functional(SmallNet):
    def forward(self, images):
        return self.body(self.stem(images)).mean([2, 3]) @ self.fc.weight


@pytest.mark.parametrize("model", [ByKeyword, Functional])
def test_a_classifier_that_hooks_do_not_see_is_none(model):
    assert DINOWrapper(model(), small_conf()).embed_dim == 10


def test_of_outputs_that_are_no_features_the_error_says_only_what_helps():
    class Several(SmallNet):
        def forward(self, images):
            return super().forward(images), images

    with pytest.raises(ValueError, match=r"is a tuple of 2, .* such as lambda outputs: outputs\[0\]$"):
        DINOWrapper(nn.Sequential(Several()), small_conf())


class KnowsItself(SmallNet):
    """Its copies compute with the layers of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = lambda images: self.body(self.stem(images)).mean([2, 3])

    def forward(self, images):
        return self.pooled(images)


class Remembers(SmallNet):
    """Its copies' hooks write to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []
        self.body.register_forward_post_hook(lambda layer, inputs, output: self.seen.append(output))

    def forward(self, images):
        self.body(self.stem(images))
        return self.seen.pop().mean([2, 3])


def test_a_model_whose_copy_is_not_its_own_is_refused():
    with pytest.raises(ValueError, match="calls the layers of the original .* make what computes it a method"):
        DINOWrapper(KnowsItself(), small_conf())
    with pytest.raises(ValueError, match="the copy of Remembers .* fails where Remembers does not .*IndexError"):
        DINOWrapper(Remembers(), small_conf())
