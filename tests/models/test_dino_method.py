"""The method DINO: one recorded step, and what it promises to the engine."""

import functools
import json

import numpy as np
import paddle
import pytest
from paddle import nn

from passl.models import DINO, DINOHead, VisionTransformer
from passl.models.multi_crop import MultiCropNetwork
from passl.schedules import Timeline
from tests.models.weights import assert_close, load, to_torch


def recorded_method(reference, variant: str, dtype: str):
    """-> DINO with the recorded initial weights, the recording."""
    meta = json.loads((reference / "traj_meta.json").read_text())[variant]
    options = dict(zip(meta["argv"][::2], meta["argv"][1::2]))
    backbone = functools.partial(VisionTransformer, patch_size=meta["patch_size"], **meta["arch"])
    head = functools.partial(
        DINOHead,
        out_dim=int(options["--out_dim"]),
        norm_last_layer=options.get("--norm_last_layer", "true") == "true",
        use_bn=options.get("--use_bn_in_head", "false") == "true",
        **meta["head"],
    )
    method = DINO(backbone, head)
    own = np.load(reference / f"traj_{variant}_f32.npz")
    init = own if any(key.startswith("init/") for key in own.files) else np.load(reference / "traj_init.npz")
    for network in (method.student, method.teacher):
        load(network, init, prefix="init/student/")
    method.train()
    return method, np.load(reference / f"traj_{variant}_{dtype}.npz")


def recorded_batch(reference, order: np.ndarray, dtype: str) -> dict:
    crops = np.load(reference / "traj_crops.npz")
    batch = {}
    for name in ("global_crops", "local_crops"):
        views = crops[name][order].swapaxes(0, 1)  # view by view
        batch[name] = paddle.to_tensor(views.reshape(-1, *views.shape[2:]).astype(dtype))
    return batch


def variants(reference) -> list:
    return sorted(json.loads((reference / "traj_meta.json").read_text()))


@pytest.mark.smoke
def test_first_step_in_float64(reference, float64):
    for variant in variants(reference):
        method, recorded = recorded_method(reference, variant, "f64")
        batch = recorded_batch(reference, recorded["order"][0], "float64")
        outputs = {"student": [], "teacher": []}
        for name, kept in outputs.items():
            getattr(method, name).register_forward_post_hook(
                lambda _, __, output, kept=kept: kept.append(output.numpy())
            )
        loss = method(batch, teacher_temp=float(recorded["teacher_temp"][0]))["loss"]
        loss.backward()
        assert_close(loss.item(), recorded["loss"][0], 1e-10, f"{variant} loss")
        for name, (output,) in outputs.items():
            if f"step0/{name}_output" in recorded:
                assert_close(output, recorded[f"step0/{name}_output"], 1e-10, f"{variant} {name}")
        check_gradients(method, recorded, variant)
        method.after_step(teacher_momentum=0.9)
        assert_close(method.dino_loss.center[0], recorded["center_after"][0], 1e-10, f"{variant} center")


def check_gradients(method, recorded, variant: str) -> None:
    parameters = {n: p for n, p in method.student.named_parameters() if not n.endswith(("_mean", "_variance"))}
    names = recorded["param_names"].tolist()
    assert sorted(names) == sorted(parameters)
    for name, norm in zip(names, recorded["grad_norms_before_clip"][0]):
        gradient = parameters[name].grad
        assert (gradient is None) == bool(np.isnan(norm)), f"{variant} {name}"
        if gradient is None:
            continue
        gradient = to_torch(name, gradient)
        assert_close(np.linalg.norm(gradient), norm, 1e-8, f"{variant} norm of {name}")
        if f"step0/grad/{name}" in recorded:
            assert_close(gradient, recorded[f"step0/grad/{name}"], 1e-10, f"{variant} {name}")


def test_crops_are_batched_like_the_official_wrapper(reference):
    """Runs of consecutive equal sizes, one backbone call each, one head call."""
    recorded = np.load(reference / "units.npz")
    crops = []
    while f"multicrop/crop{len(crops)}" in recorded:
        crops.append(paddle.to_tensor(recorded[f"multicrop/crop{len(crops)}"]))
    calls = []

    class SpatialMean(nn.Layer):
        def forward(self, x):
            calls.append(x.shape)
            return x.mean([2, 3])

    output = MultiCropNetwork(SpatialMean(), nn.Identity())(crops)
    assert_close(calls, recorded["multicrop/backbone_batches"], 0, "batches")
    assert_close(output, recorded["multicrop/out"], 1e-6, "output")


def tiny_method(**arguments) -> DINO:
    backbone = functools.partial(VisionTransformer, 16, 8, embed_dim=6, depth=2, num_heads=2, drop_path_rate=0.5)
    head = functools.partial(DINOHead, out_dim=12, hidden_dim=8, bottleneck_dim=4, norm_last_layer=False)
    return DINO(backbone, head, **arguments)


def tiny_batch(batch: int = 2) -> dict:
    return {"global_crops": paddle.randn([2 * batch, 3, 16, 16]), "local_crops": paddle.randn([3 * batch, 3, 8, 8])}


def test_teacher_starts_as_the_student_without_drop_path_and_gradients():
    method = tiny_method()
    student, teacher = method.student.state_dict(), method.teacher.state_dict()
    assert all((student[name].numpy() == teacher[name].numpy()).all() for name in student)
    assert not {id(p) for p in method.student.parameters()} & {id(p) for p in method.teacher.parameters()}
    assert [block.drop_path.rate for block in method.teacher.backbone.blocks] == [0.0, 0.0]
    assert [block.drop_path.rate for block in method.student.backbone.blocks] == [0.0, 0.5]
    method(tiny_batch(), teacher_temp=0.04)["loss"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert all(parameter.grad is not None for parameter in method.student.parameters())
    assert method.backbone is method.teacher.backbone


def test_no_local_crops():
    batch = {"global_crops": paddle.randn([4, 3, 16, 16])}
    assert np.isfinite(tiny_method()(batch, teacher_temp=0.04)["loss"].item())


def test_a_batch_without_crops():
    batch = {"image": paddle.zeros([4, 3, 16, 16]), "index": paddle.arange(4)}
    with pytest.raises(ValueError, match="needs 'global_crops', and the batch has only image, index: .* MultiCrop"):
        tiny_method()(batch, teacher_temp=0.04)


@pytest.mark.smoke
def test_frozen_last_layer_is_unknown_to_the_optimizer():
    method = tiny_method(freeze_last_layer=1)
    groups = [{"params": group["params"]} for group in method.param_groups()]
    optimizer = paddle.optimizer.AdamW(learning_rate=0.1, parameters=groups, weight_decay=0.1)
    last = list(method.student.head.last_layer.parameters())

    def step(epoch: int) -> None:
        method(tiny_batch(), teacher_temp=0.04)["loss"].backward()
        method.after_backward(epoch)
        optimizer.step()
        optimizer.clear_grad()

    def state_of_last() -> dict:
        state = optimizer.state_dict()
        return {key: state[key].numpy() for key in state if any(key.startswith(p.name + "_") for p in last)}

    before = [p.numpy().copy() for p in last]
    step(epoch=0)
    assert not state_of_last()
    assert all((p.numpy() == old).all() for p, old in zip(last, before))
    step(epoch=1)
    state = state_of_last()
    assert len(state) == 4 * len(last)  # two moments, and two powers of beta that count one step
    assert all(np.isclose(value, 0.9**2) for key, value in state.items() if "beta1_pow" in key)
    assert not any((p.numpy() == old).all() for p, old in zip(last, before))
    frozen_again = [p.numpy().copy() for p in last]
    step(epoch=0)
    assert all((state_of_last()[key] == value).all() for key, value in state.items())
    assert all((p.numpy() == old).all() for p, old in zip(last, frozen_again))


@pytest.mark.smoke
def test_a_frozen_backbone_is_as_in_evaluation_until_it_thaws():
    paddle.seed(0)
    method = tiny_method(freeze_backbone="3it")
    schedule = method.schedules(Timeline(10, 5))["backbone_frozen"]
    assert [schedule(step) for step in range(5)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert tiny_method().schedules(Timeline(10, 5)) == {}
    batch = tiny_batch()

    def loss(frozen: bool, seed: int) -> float:
        paddle.seed(seed)
        method.train()
        value = method(batch, teacher_temp=0.04, backbone_frozen=float(frozen))["loss"]
        value.backward()
        method.after_backward(epoch=5)
        return value.item()

    assert loss(True, 1) == loss(True, 2)  # nothing is dropped
    assert all(p.grad is None for p in method.student.backbone.parameters())
    assert all(p.grad is not None for p in method.student.head.parameters())
    assert loss(False, 1) != loss(False, 2)
    assert method.student.backbone.training
    assert method.student.backbone.blocks[0].drop_path.training
    assert all(p.grad is not None for p in method.student.backbone.parameters())
    method.eval()
    method(batch, teacher_temp=0.04, backbone_frozen=1.0)
    method(batch, teacher_temp=0.04)
    assert not method.student.backbone.training


def test_teacher_is_the_moving_average_of_parameters_only():
    head = functools.partial(DINOHead, out_dim=12, hidden_dim=8, bottleneck_dim=4, use_bn=True)
    method = DINO(functools.partial(VisionTransformer, 16, 8, embed_dim=6, depth=1, num_heads=1), head)
    for value in method.student.state_dict().values():
        value.set_value(value + 1.0)
    before = {name: value.numpy().copy() for name, value in method.teacher.state_dict().items()}
    method.after_step(teacher_momentum=0.75)
    for name, value in method.teacher.state_dict().items():
        moved = 0.0 if name.endswith(("_mean", "_variance")) else 0.25
        assert_close(value, before[name] + moved, 1e-6, name)


def test_backbone_without_drop_path_argument():
    class Pooled(nn.Layer):
        def __init__(self, embed_dim: int = 3) -> None:
            super().__init__()
            self.embed_dim = embed_dim

        def forward(self, x):
            return x.mean([2, 3])

    method = DINO(Pooled, functools.partial(DINOHead, out_dim=12, hidden_dim=8, bottleneck_dim=4))
    method(tiny_batch(), teacher_temp=0.04)["loss"].backward()


def test_parameter_groups(reference):
    recorded = np.load(reference / "units.npz")
    cases = {key.split("/")[1] for key in recorded.files if key.startswith("groups/")}
    assert cases
    for case in cases:
        names = recorded[f"groups/{case}/all"].tolist()
        regularized = set(recorded[f"groups/{case}/regularized"].tolist())
        rest = set(recorded[f"groups/{case}/not_regularized"].tolist())
        method = method_with_parameters(names, norm_last_layer="head.last_layer.weight_g" not in regularized)
        known = {id(parameter): name for name, parameter in method.student.named_parameters()}
        assert set(names) <= set(known.values()), case
        groups = method.param_groups()
        assert [group["weight_decay"] for group in groups] == [1.0, 0.0]
        assert [{known[id(p)] for p in group["params"]} for group in groups] == [regularized, rest], case


def method_with_parameters(names: list, norm_last_layer: bool) -> DINO:
    """A DINO whose student has parameters of these names."""
    depth = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("backbone.blocks."))
    indices = sorted({int(name.split(".")[2]) for name in names if name.startswith("head.mlp.")})
    use_bn = 1 in indices
    num_layers = 1 + len(indices) // 2 if use_bn else len(indices)
    backbone = functools.partial(VisionTransformer, 16, 8, embed_dim=6, depth=depth, num_heads=1)
    head = functools.partial(
        DINOHead,
        out_dim=12,
        hidden_dim=8,
        bottleneck_dim=4,
        num_layers=num_layers,
        use_bn=use_bn,
        norm_last_layer=norm_last_layer,
    )
    return DINO(backbone, head)
