"""The wrapper computes what the engine's methods compute."""

from __future__ import annotations

import functools

import numpy as np
import paddle
import pytest

from passl import DINOWrapper
from passl.models import DINO, DINOHead, DINOv2, VisionTransformer
from passl.models.distillation import SelfDistillation
from passl.models.resnet import resnet18
from tests.wrapper.small import CROP, IMAGE, crops, small_conf

HEAD = {"out_dim": 16, "hidden_dim": 8, "bottleneck_dim": 4, "use_bn": True}
VIT = functools.partial(VisionTransformer, img_size=IMAGE, patch_size=8, embed_dim=12, depth=2, num_heads=2)
HIDING = functools.partial(VIT, mask_token=True)


def method(version: str, backbone: object) -> SelfDistillation:
    head = functools.partial(DINOHead, **HEAD)
    if version == "v1":
        return DINO(backbone, head, freeze_last_layer=0)
    weight = 1.0 if backbone is HIDING else 0.0
    return DINOv2(backbone, head, freeze_last_layer=0, centering="sinkhorn", ibot_loss_weight=weight, layer_decay=1.0)


def with_weights_of(engine: SelfDistillation, backbone: object, version: str, **settings: object) -> DINOWrapper:
    wrapper = DINOWrapper(backbone(), small_conf(version=version, **settings))
    state = {name.replace(".backbone.", ".backbone.model."): value for name, value in engine.state_dict().items()}
    missing, unexpected = wrapper.method.set_state_dict(state)
    assert not unexpected
    assert not [name for name in missing if not name.endswith(("fc.weight", "fc.bias"))]
    return wrapper


def gradients(layer: paddle.nn.Layer) -> dict[str, np.ndarray]:
    return {
        name.replace(".model.", "."): parameter.grad.numpy()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("version", "backbone"),
    [("v1", VIT), ("v2", VIT), ("v1", resnet18), ("v2", resnet18), ("v2", HIDING)],
    ids=["v1-ViT", "v2-ViT", "v1-ResNet", "v2-ResNet", "v2-iBOT"],
)
def test_losses_gradients_centre_and_teacher_are_the_engines(version, backbone):
    paddle.seed(3)
    engine = method(version, backbone)
    momenta = {"momentum_teacher": 0.9, "teacher_temp": 0.05, "warmup_teacher_temp": 0.05}
    wrapper = with_weights_of(engine, backbone, version, **momenta)
    optimizers = [paddle.optimizer.SGD(0.01, parameters=layer.parameters()) for layer in (engine, wrapper)]
    for step in range(3):
        views = crops(seed=step)
        if backbone is HIDING:
            views["masks"] = paddle.rand([8, 16]) < 0.3
        expected = engine(views, teacher_temp=0.05)["loss"]
        output, loss = wrapper(views)
        expected.backward()
        loss.backward()
        assert loss.item() == expected.item()
        assert output.shape == [4, wrapper.embed_dim]
        wanted, found = gradients(engine), gradients(wrapper.method)
        assert wanted.keys() == found.keys()
        for name, gradient in wanted.items():
            np.testing.assert_array_equal(found[name], gradient, err_msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.clear_grad()
        engine.after_step(teacher_momentum=0.9)
        wrapper.ema_update(step)
    np.testing.assert_array_equal(wrapper.method.dino_loss.center.numpy(), engine.dino_loss.center.numpy())
    for name, value in engine.teacher.backbone.state_dict().items():
        np.testing.assert_array_equal(wrapper.teacher.state_dict()[name].numpy(), value.numpy(), err_msg=name)


def test_the_output_is_the_mean_of_the_students_features_of_the_global_crops():
    paddle.seed(0)
    wrapper = DINOWrapper(VIT(), small_conf())
    views = crops()
    first, second = wrapper.model(views["global_crops"]).chunk(2)
    output, _ = wrapper(views)
    np.testing.assert_allclose(output.numpy(), ((first + second) / 2).numpy(), atol=1e-6)
    output.sum().backward()
    assert wrapper.model.patch_embed.proj.weight.grad is not None
    assert CROP < IMAGE
