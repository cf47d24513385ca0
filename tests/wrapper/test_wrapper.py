"""DINOWrapper in a loop of one's own."""

from __future__ import annotations

import copy
import logging

import numpy as np
import paddle
import pytest
from paddle import nn

import passl
from passl import DINOConf, DINOWrapper
from passl.models import VisionTransformer
from tests.wrapper.small import SmallNet, batch, crops, small_conf, small_wrapper, train


@pytest.mark.smoke
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_four_lines_train_the_model_that_was_given(version):
    paddle.seed(0)
    model = SmallNet()
    before = model.body[0].weight.numpy()
    dino_model = DINOWrapper(model, small_conf(version=version))
    teacher = dino_model.teacher.body[0].weight.numpy()
    assert dino_model.model is model
    assert all(np.isfinite(train(dino_model, 2)))
    assert not np.array_equal(model.body[0].weight.numpy(), before)
    assert not np.array_equal(dino_model.teacher.body[0].weight.numpy(), teacher)
    assert model(paddle.rand([2, 3, 32, 32])).shape == [2, 10]  # its own calls still give logits


def test_it_works_with_no_configuration_at_all():
    output, loss = DINOWrapper(SmallNet())(batch(2))
    assert output.shape == [2, 12]
    assert loss.shape == []
    assert loss.item() > 0


def test_a_criterion_on_the_output_reaches_the_model():
    wrapper = small_wrapper()
    output, _ = wrapper(batch())
    output.square().mean().backward()
    assert wrapper.model.stem[0].weight.grad is not None


def test_validation_gives_the_teachers_features_of_the_normalised_images():
    wrapper = small_wrapper(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    train(wrapper, 2)
    images = batch()
    statistics = wrapper.teacher.stem[1]._mean.numpy()
    found = wrapper(images, mode="val")
    assert found.stop_gradient
    np.testing.assert_array_equal(wrapper.teacher.stem[1]._mean.numpy(), statistics)
    assert wrapper.teacher.training
    teacher = wrapper.teacher
    teacher.eval()
    normalised = (images.astype("float32") / 255 - 0.5) / 0.25
    expected = teacher.body(teacher.stem(normalised)).mean([2, 3])
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


def test_losses_are_there_to_log():
    wrapper = small_wrapper(version="v2")
    _, loss = wrapper(batch())
    assert set(wrapper.losses) == {"loss", "dino_loss", "koleo_loss"}
    assert wrapper.losses["loss"].item() == loss.item()
    assert all(part.stop_gradient for part in wrapper.losses.values())


def test_in_evaluation_mode_the_loss_changes_nothing():
    wrapper = small_wrapper()
    wrapper.eval()
    before = {name: value.numpy() for name, value in wrapper.state_dict().items() if name != "num_forwards"}
    with paddle.no_grad():
        _, loss = wrapper(batch())
    assert np.isfinite(loss.item())
    for name, value in before.items():
        np.testing.assert_array_equal(wrapper.state_dict()[name].numpy(), value, err_msg=name)


def test_seeds_make_the_views():
    losses = {seed: train(small_wrapper(seed=seed), 1) for seed in (0, 1)}
    assert losses[0] == train(small_wrapper(seed=0), 1)
    assert losses[0] != losses[1]


@pytest.mark.smoke
def test_a_copy_goes_on_the_same_way():
    wrapper = small_wrapper(freeze_last_layer=1)
    train(wrapper, 1)
    copied = copy.deepcopy(wrapper)
    assert copied.model is not wrapper.model
    last_layers = [one.method.student.head.last_layer.weight_v for one in (wrapper, copied)]
    before = last_layers[1].numpy()
    assert train(copied, 2, start=1) == train(wrapper, 2, start=1)
    for layer in last_layers:  # a copy's is frozen too
        np.testing.assert_array_equal(layer.numpy(), before)


@pytest.mark.parametrize("settings", [{}, {"return_layer": ["stem", "body"]}])
def test_networks_of_float64_take_the_same_images(settings):
    paddle.set_default_dtype("float64")
    try:
        wrapper = small_wrapper(**settings)
    finally:
        paddle.set_default_dtype("float32")
    output, loss = wrapper(batch())
    loss.backward()
    assert output.dtype == loss.dtype == wrapper(batch(), mode="val").dtype == paddle.float64


# --- the last layer ---


@pytest.mark.parametrize("optimizer", [paddle.optimizer.AdamW, paddle.optimizer.Momentum])
def test_the_last_layer_stays_as_it_is_in_the_first_epochs(optimizer):
    wrapper = small_wrapper(freeze_last_layer=2)
    weight = wrapper.method.student.head.last_layer.weight_v
    optimizer = optimizer(1e-2, parameters=wrapper.parameters())
    directions = [weight.numpy() / np.linalg.norm(weight.numpy(), axis=0)]
    for epoch in range(3):
        for _ in range(2):  # two micro-batches
            _, loss = wrapper(batch(), epoch)
            loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        wrapper.ema_update(epoch)
        directions.append(weight.numpy() / np.linalg.norm(weight.numpy(), axis=0))
    np.testing.assert_allclose(directions[2], directions[0], atol=1e-6)
    assert not np.allclose(directions[3], directions[2], atol=1e-6)


def test_by_default_it_stays_as_it_is_throughout():
    wrapper = small_wrapper(freeze_last_layer=None, epochs=1, len_train_loader=2)
    weight = wrapper.method.student.head.last_layer.weight_v
    before = weight.numpy()
    train(wrapper, 4)  # also behind the epochs
    np.testing.assert_array_equal(weight.numpy(), before)
    assert DINOConf().freeze_last_layer is None


def test_with_the_length_of_an_epoch_the_epoch_need_not_be_told():
    wrapper = small_wrapper(freeze_last_layer=1, len_train_loader=2)
    weight = wrapper.method.student.head.last_layer.weight_v
    before = weight.numpy()
    train(wrapper, 2)
    np.testing.assert_array_equal(weight.numpy(), before)
    train(wrapper, 1, start=2)
    assert not np.array_equal(weight.numpy(), before)


# --- the teacher ---


def test_the_momentum_goes_from_its_first_value_to_1(monkeypatch):
    wrapper = small_wrapper(momentum_teacher=0.9, epochs=2, len_train_loader=5)
    momenta = []
    monkeypatch.setattr(wrapper.method, "after_step", lambda momentum: momenta.append(momentum))
    for step in (0, 5, 9, 10, 30):
        wrapper.ema_update(step)
    np.testing.assert_allclose(momenta, [0.9, 0.95, 1 - 0.05 * (1 + np.cos(np.pi * 0.9)), 1, 1], atol=1e-12)
    wrapper.ema_update()
    assert wrapper.next_step.item() == 32


def test_without_the_length_of_an_epoch_the_momentum_stays(monkeypatch):
    wrapper = small_wrapper(momentum_teacher=0.9)
    momenta = []
    monkeypatch.setattr(wrapper.method, "after_step", lambda momentum: momenta.append(momentum))
    for step in (0, 1000):
        wrapper.ema_update(step)
    assert momenta == [0.9, 0.9]


@pytest.mark.parametrize(
    ("settings", "calls", "expected"),
    [
        ({"version": "v1"}, [(0, 0), (1, 0), (2, 0), (9, 0)], [0.04, 0.055, 0.07, 0.07]),
        ({"version": "v1", "len_train_loader": 2}, [(0, 0), (0, 1), (0, 2), (0, 4)], [0.04, 0.04, 0.055, 0.07]),
        ({"version": "v2", "len_train_loader": 2}, [(0, 0), (0, 1), (2, 0), (0, 5)], [0.04, 0.046, 0.064, 0.07]),
    ],
)
def test_the_teachers_temperature_rises_by_epoch_and_in_version_2_by_step(monkeypatch, settings, calls, expected):
    wrapper = small_wrapper(teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=3, **settings)
    temperatures = []
    forward = wrapper.method.forward
    monkeypatch.setattr(
        wrapper.method,
        "forward",
        lambda views, teacher_temp: (temperatures.append(teacher_temp), forward(views, teacher_temp))[1],
    )
    for epoch, step in calls:
        wrapper.next_step.set_value(paddle.full([1], step, "int64"))
        wrapper(crops(), epoch)
    np.testing.assert_allclose(temperatures, expected, atol=1e-12)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_teacher_that_is_forgotten_is_a_warning(caplog):
    wrapper = small_wrapper(local_crops_number=0)
    views = crops(2, num_local=0)
    del views["local_crops"]
    with caplog.at_level(logging.WARNING, logger="passl"):
        for _ in range(99):
            wrapper(views)
        assert not warnings_of(caplog)
        wrapper(views)
    assert "100 times, and the teacher has not moved: call ema_update(step)" in caplog.text


def test_the_teacher_has_no_dropout():
    model = SmallNet()
    model.drop = nn.Dropout(0.5)
    wrapper = DINOWrapper(model, small_conf())
    assert wrapper.teacher.drop.p == 0.0
    assert model.drop.p == 0.5


# --- version 2 with hidden patches ---


def vit(**settings: object) -> VisionTransformer:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"mask_token": True}, None), ({}, "DINOv2 without iBOT: VisionTransformer has no mask token")],
)
def test_patches_are_hidden_from_backbones_that_have_a_mask_token(caplog, settings, said):
    with caplog.at_level(logging.INFO, logger="passl"):
        wrapper = DINOWrapper(vit(**settings), small_conf(version="v2"))
    assert ("ibot_loss" in str(wrapper.method.state_dict().keys())) is (said is None)
    assert (said is None) or said in caplog.text
    output, loss = wrapper(batch())
    loss.backward()
    assert output.shape == [4, 12]
    assert ("ibot_loss" in wrapper.losses) is (said is None)
    if said is None:
        assert np.abs(wrapper.model.mask_token.grad.numpy()).max() > 0


# --- errors ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w(batch(), mode="eval"), "mode ('eval') must be 'train' or 'val'. Did you mean 'val'?"),
        (lambda w: w(batch(), epoch=-1), "epoch (-1) must be a whole number"),
        (lambda w: w(batch(), epoch=0.5), "epoch (0.5) must be a whole number"),
        (lambda w: w.ema_update(-1), "step (-1) must be a whole number"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError) as caught:
        call(small_wrapper())
    assert message in str(caught.value)


def test_wrong_configs():
    with pytest.raises(TypeError, match="configs must be a DINOConf, a dict"):
        DINOWrapper(SmallNet(), "v2")
    assert DINOWrapper(SmallNet(), {"version": "v2"}).configs == DINOConf(version="v2")


def test_later_changes_of_the_settings_are_not_the_wrappers():
    conf = small_conf()
    wrapper = DINOWrapper(SmallNet(), conf)
    conf.epochs = 3
    assert wrapper.configs.epochs == 100


def test_one_image_and_one_local_crop_are_too_few_for_batch_norms():
    wrapper = small_wrapper(local_crops_number=1)
    with pytest.raises(ValueError) as caught:
        wrapper(batch(1))
    assert "a batch of 1 image, with one local crop of it: the batch norms of SmallNet (stem.1 ...)" in str(
        caught.value
    )
    _, loss = small_wrapper(version="v2")(batch(1))
    assert np.isfinite(loss.item())


def test_a_model_that_cannot_learn_is_an_error():
    model = SmallNet()
    for parameter in model.parameters():
        parameter.stop_gradient = True
    with pytest.raises(ValueError, match="the features of SmallNet have no gradient"):
        DINOWrapper(model, small_conf())(batch())


def test_passl_offers_nothing_else_by_accident():
    assert passl.DINOConf is DINOConf
    with pytest.raises(AttributeError, match="module 'passl' has no attribute 'DINOWrap'"):
        _ = passl.DINOWrap
