"""The method DINOv2: its loss in plain numpy, what it has in common with DINO, and what it promises to the engine."""

from __future__ import annotations

import functools
import math

import numpy as np
import paddle
import pytest
from paddle import nn

from passl.engine.optim import AdamW
from passl.models import DINO, DINOHead, ResNet, VisionTransformer, XCiT
from passl.models.dinov2 import DINOv2
from passl.models.dinov2.method import hidden_patches
from tests.models.weights import assert_close

B, N_LOCAL, K, TEMP = 3, 2, 20, 0.05
HEAD = functools.partial(DINOHead, out_dim=K, hidden_dim=12, bottleneck_dim=6, norm_last_layer=False)
OWN_HEAD = functools.partial(DINOHead, out_dim=K + 5, hidden_dim=10, bottleneck_dim=4, norm_last_layer=False)


def vit(**arguments) -> functools.partial:
    sizes = {"embed_dim": 12, "depth": 2, "num_heads": 2, "mask_token": True}
    return functools.partial(VisionTransformer, 16, 4, **{**sizes, **arguments})


class Pooled(nn.Layer):
    """A network that knows nothing of patches, blocks or drop path."""

    def __init__(self, embed_dim: int = 6) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.conv = nn.Conv2D(3, embed_dim, 3)

    def forward(self, x):
        return self.conv(x).tanh().mean([2, 3])


def method_of(backbone=None, head=HEAD, **arguments) -> DINOv2:
    paddle.seed(0)
    method = DINOv2(backbone or vit(), head, **arguments)
    method.train()
    return method


def batch_of(hidden: float = 0.4, seed: int = 0, dtype: str = "float32") -> dict:
    rng = np.random.default_rng(seed)
    masks = rng.random((2 * B, 16)) < hidden
    masks[1] = False  # an image of which nothing is hidden
    crops = {"global_crops": (2 * B, 3, 16, 16), "local_crops": (N_LOCAL * B, 3, 8, 8)}
    batch = {name: paddle.to_tensor(rng.standard_normal(shape).astype(dtype)) for name, shape in crops.items()}
    return {**batch, "masks": paddle.to_tensor(masks)}


def move_apart(method: DINOv2) -> None:
    """So that student and teacher, and the centres, are not what they start with."""
    paddle.seed(5)
    for parameter in method.parameters():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape).astype(parameter.dtype))
    for loss in method._losses():
        loss.center.set_value(0.3 * paddle.randn(loss.center.shape).astype(loss.center.dtype))


# --- the loss, written a second time ---


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sinkhorn(logits: np.ndarray, temperature: float) -> np.ndarray:
    q = np.exp(logits / temperature).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def cross_entropy(target: np.ndarray, logits: np.ndarray) -> float:
    return float(-(target * np.log(softmax(logits / 0.1))).sum())


def expected_losses(student: list, teacher: np.ndarray, masks: np.ndarray, heads: dict, targets_of) -> dict:
    """student: tokens [2B, T, D] and [nB, T', D]; teacher: [2B, T, D]; heads: functions of rows [M, D]."""
    cls = np.concatenate([tokens[:, 0] for tokens in student])
    views = heads["student"](cls).reshape(2 + N_LOCAL, B, -1)
    targets = targets_of("dino", heads["teacher"](teacher[:, 0])).reshape(2, B, -1)
    pairs = [
        np.mean([cross_entropy(target, logits) for target, logits in zip(targets[t], views[s])])
        for t in range(2)
        for s in range(2 + N_LOCAL)
        if s != t
    ]
    koleo = 0.0
    for view in student[0][:, 0].reshape(2, B, -1):
        unit = view / np.linalg.norm(view, axis=-1, keepdims=True)
        for i in range(B):
            nearest = min((j for j in range(B) if j != i), key=lambda j: np.linalg.norm(unit[i] - unit[j]))
            koleo -= math.log(np.linalg.norm(unit[i] - unit[nearest] + 1e-8) + 1e-8) / B
    patches = slice(teacher.shape[1] - masks.shape[1], None)
    hidden = [(image, patch) for image in range(2 * B) for patch in range(masks.shape[1]) if masks[image, patch]]
    targets = targets_of("ibot", heads["teacher_ibot"](np.stack([teacher[i, patches][p] for i, p in hidden])))
    logits = heads["student_ibot"](np.stack([student[0][i, patches][p] for i, p in hidden]))
    ibot = 0.0
    for (image, _), target, row in zip(hidden, targets, logits):
        ibot += cross_entropy(target, row) / masks[image].sum() / (2 * B)
    return {"dino": np.mean(pairs), "koleo": koleo, "ibot": ibot}


@pytest.mark.smoke
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("ibot_head", [None, OWN_HEAD])
def test_total_loss_against_plain_numpy(float64, ibot_head, centering, registers):
    weights = {"dino_loss_weight": 0.7, "ibot_loss_weight": 1.3, "koleo_loss_weight": 0.2}
    method = method_of(vit(num_register_tokens=registers), ibot_head=ibot_head, centering=centering, **weights)
    move_apart(method)
    batch = batch_of(dtype="float64")
    outputs = method(batch, teacher_temp=TEMP)
    centers = {"dino": method.dino_loss.center.numpy(), "ibot": method.ibot_loss.center.numpy()}

    def targets_of(which: str, logits: np.ndarray) -> np.ndarray:
        return sinkhorn(logits, TEMP) if centering == "sinkhorn" else softmax((logits - centers[which]) / TEMP)

    def rows(head):
        return lambda x: head(paddle.to_tensor(x)).numpy()

    student_head, teacher_head = method._ibot_heads()
    heads = {"student": rows(method.student.head), "teacher": rows(method.teacher.head)}
    heads.update(student_ibot=rows(student_head), teacher_ibot=rows(teacher_head))
    student = method.student.backbone.forward_crops(
        [batch["global_crops"], batch["local_crops"]], [batch["masks"], None]
    )
    (teacher,) = method.teacher.backbone.forward_crops([batch["global_crops"]])
    expected = expected_losses(
        [tokens.numpy() for tokens in student], teacher.numpy(), batch["masks"].numpy(), heads, targets_of
    )
    for name, value in expected.items():
        assert_close(outputs[f"{name}_loss"], value, 1e-10, name)
    total = sum(weights[f"{name}_loss_weight"] * value for name, value in expected.items())
    assert_close(outputs["loss"], total, 1e-10, "total")


def test_the_student_alone_sees_the_mask_token(float64):
    """Other pixels where patches are hidden change the teacher's targets, and nothing of the student's patches."""
    method = method_of(koleo_loss_weight=0.0)
    batch = batch_of(hidden=2.0, dtype="float64")
    batch["masks"][:] = True
    tokens = []
    method.student.backbone.norm.register_forward_post_hook(lambda _, __, out: tokens.append(out.numpy()))
    losses = []
    for factor in (1.0, -2.0):
        changed = {**batch, "global_crops": batch["global_crops"] * factor}
        losses.append(method(changed, teacher_temp=TEMP)["ibot_loss"].item())
    assert losses[0] != losses[1]
    student = [t for t in tokens if t.shape[1] == 17]
    assert (student[0] == student[-1]).all()


# --- DINO in it ---


@pytest.mark.smoke
@pytest.mark.parametrize(
    "backbone",
    [vit(drop_path_rate=0.3, mask_token=False), functools.partial(ResNet, (1, 1, 1, 1), width=4), Pooled],
    ids=["vit", "resnet", "plain"],
)
def test_without_ibot_and_koleo_it_is_dino(backbone):
    """The same loss and gradients, to the last bit; of the same draws."""
    off = {"ibot_loss_weight": 0.0, "koleo_loss_weight": 0.0}
    batch = batch_of()
    results = []
    for build in (DINO, functools.partial(DINOv2, **off)):
        paddle.seed(0)
        method = build(backbone, HEAD)
        method.train()
        for _ in range(2):  # the second with a centre that moved
            paddle.seed(7)
            outputs = method(batch, teacher_temp=TEMP)
            outputs["loss"].backward()
            gradients = {name: p.grad.numpy() for name, p in method.named_parameters() if p.grad is not None}
            results.append((outputs["loss"].item(), gradients, method.dino_loss.center.numpy()))
            method.after_backward(epoch=5)
            method.after_step(teacher_momentum=0.9)
            method.clear_gradients()
    for (loss, gradients, center), (other, others, other_center) in zip(results[:2], results[2:]):
        assert loss == other
        assert gradients.keys() == others.keys()
        assert all((gradients[name] == others[name]).all() for name in gradients)
        assert (center == other_center).all()


def test_what_a_step_tells_is_about_the_views():
    """Patches go through the same heads; with nothing hidden DINO tells the same of the same networks."""
    batch = batch_of(hidden=0.0)
    numbers = []
    for build in (DINO, DINOv2):
        paddle.seed(0)
        method = build(vit(), HEAD)
        method.train()
        method.observe()
        method(batch, teacher_temp=TEMP)
        numbers.append(method.diagnostics())
        assert method.diagnostics() == {}
    assert numbers[0].keys() == numbers[1].keys()
    for name, value in numbers[0].items():
        assert numbers[1][name] == pytest.approx(value, rel=1e-4), name


# --- what it promises to the engine ---


@pytest.mark.smoke
@pytest.mark.parametrize("hidden", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("ibot_head", [None, OWN_HEAD])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_every_trained_parameter_has_a_gradient(hidden, ibot_head, centering):
    """Also with no patch hidden, or all: data parallel training waits for each."""
    method = method_of(vit(num_register_tokens=2), ibot_head=ibot_head, centering=centering)
    outputs = method(batch_of(hidden), teacher_temp=TEMP)
    assert all(np.isfinite(value.item()) for value in outputs.values())
    outputs["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == parameter.stop_gradient, name
        assert parameter.stop_gradient or np.isfinite(parameter.grad.numpy()).all(), name
    trained = {name for name, parameter in method.named_parameters() if not parameter.stop_gradient}
    assert "student.backbone.mask_token" in trained
    assert not {name for name in trained if name.startswith("teacher")}


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.1), (1.0, 0.0, 0.1), (1.0, 1.0, 0.0)])
def test_losses_of_weight_zero(weights):
    method = method_of(**dict(zip(("dino_loss_weight", "ibot_loss_weight", "koleo_loss_weight"), weights)))
    outputs = method(batch_of(), teacher_temp=TEMP)
    names = {"dino"} | {name for name, weight in zip(("dino", "ibot", "koleo"), weights) if weight}
    assert outputs.keys() == {"loss", *(f"{name}_loss" for name in names)}
    outputs["loss"].backward()
    trained = [p for p in method.parameters() if not p.stop_gradient]
    assert all(p.grad is not None for p in trained)
    assert method.student.backbone.mask_token.stop_gradient == (not weights[1])


def test_teacher_and_centres_follow():
    method = method_of(ibot_head=OWN_HEAD)
    move_apart(method)
    before = {name: value.numpy().copy() for name, value in method.state_dict().items()}
    method(batch_of(), teacher_temp=TEMP)
    method.after_skipped_step()
    method.after_step(teacher_momentum=1.0)
    after = method.state_dict()
    assert all((after[name].numpy() == value).all() for name, value in before.items())
    method(batch_of(), teacher_temp=TEMP)
    method.after_step(teacher_momentum=0.75)
    after = {name: value.numpy() for name, value in method.state_dict().items()}
    for name in [name for name in before if name.startswith("teacher")]:
        expected = 0.75 * before[name] + 0.25 * before[name.replace("teacher", "student", 1)]
        assert_close(after[name], expected, 1e-6, name)
    assert {name for name in before if name.endswith("center")} == {"dino_loss.center", "ibot_loss.center"}
    assert after["ibot_loss.center"].shape == (1, K + 5)
    assert all((after[name] != before[name]).any() for name in ("dino_loss.center", "ibot_loss.center"))


def test_what_is_not_hidden_does_not_count_for_the_centre():
    """A batch with nothing to hide adds nothing to it; and alone leaves it where it is."""
    centers = []
    for batches in ([batch_of()], [batch_of(), batch_of(hidden=0.0, seed=1)], [batch_of(hidden=0.0)]):
        method = method_of(ibot_head=OWN_HEAD)
        move_apart(method)
        before = method.ibot_loss.center.numpy()
        for batch in batches:
            method(batch, teacher_temp=TEMP)
        method.after_step(teacher_momentum=0.9)
        centers.append(method.ibot_loss.center.numpy())
    assert (centers[0] == centers[1]).all()
    assert (centers[0] != before).any()
    np.testing.assert_allclose(centers[2], before, rtol=1e-6)


@pytest.mark.parametrize("ibot_head", [None, OWN_HEAD])
def test_last_layers_are_frozen_in_the_first_epoch(ibot_head):
    method = method_of(ibot_head=ibot_head)
    last = [*method.student.head.last_layer.parameters()]
    last += [*method.student_ibot_head.last_layer.parameters()] if ibot_head else []
    for epoch, frozen in ((0, True), (1, False)):
        method(batch_of(), teacher_temp=TEMP)["loss"].backward()
        method.after_backward(epoch)
        assert all((p.grad is None) == frozen for p in last)
        assert method.student.head.mlp[0].weight.grad is not None
        method.clear_gradients()


def test_rates_of_layers():
    method = method_of(vit(num_register_tokens=1, layer_scale=0.1))
    shares = method.learning_rate_shares()
    expected = {"patch_embed.": 0.9**3 * 0.2, "blocks.0.": 0.9**2, "blocks.1.": 0.9, "norm.": 1.0}
    expected.update(dict.fromkeys(("cls_token", "pos_embed", "mask_token", "register_tokens"), 0.9**3))
    for name, share in shares.items():
        (prefix,) = (p for p in expected if name.startswith(f"student.backbone.{p}"))
        assert share == pytest.approx(expected[prefix]), name
    groups = method.param_groups()
    rate = {id(p): group.get("learning_rate", 1.0) for group in groups for p in group["params"]}
    assert rate[id(method.student.head.mlp[0].weight)] == 1.0
    assert rate[id(method.student.backbone.mask_token)] == pytest.approx(0.9**3)
    assert method_of(layer_decay=1.0, patch_embed_lr=1.0).learning_rate_shares() == {}
    assert method_of(Pooled, ibot_loss_weight=0.0).layer_decay == 1.0
    assert method_of(functools.partial(ResNet, (1, 1, 1, 1), width=4), ibot_loss_weight=0.0).layer_decay == 0.9


def test_it_learns_and_trains_the_mask_token():
    method = method_of(ibot_head=OWN_HEAD)
    optimizer = AdamW(method.param_groups())
    token = method.student.backbone.mask_token.numpy().copy()
    losses = []
    for _ in range(20):
        optimizer.set(3e-3, 0.0)
        loss = method(batch_of(), teacher_temp=TEMP)["loss"]
        loss.backward()
        losses.append(loss.item())
        method.after_backward(epoch=1)
        optimizer.step()
        optimizer.clear_grad()
        method.after_step(teacher_momentum=0.99)
    assert losses[-1] < losses[0] - 0.3
    assert (method.student.backbone.mask_token.numpy() != token).all()
    assert (method.teacher.backbone.mask_token.numpy() != token).all()
    assert method.backbone is method.teacher.backbone
    assert method.half_precision_layers() == [method.student.backbone]
    assert list(method.backbones()) == ["teacher", "student"]


def test_hidden_patches():
    masks = np.zeros((4, 6), bool)
    masks[0, [1, 4]] = masks[2] = True
    indices, weights = hidden_patches(paddle.to_tensor(masks))
    assert indices.tolist() == [1, 4, 12, 13, 14, 15, 16, 17]
    np.testing.assert_allclose(weights.numpy(), [0.5] * 2 + [1 / 6] * 6, rtol=1e-6)
    indices, weights = hidden_patches(paddle.zeros([4, 6], "bool"))
    assert (indices.tolist(), weights.tolist()) == ([0], [0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"koleo_loss_weight": -0.1}, r"koleo_loss_weight \(-0.1\) must be a number from 0 up; 0 leaves that loss out"),
        ({"ibot_loss_weight": math.nan}, r"ibot_loss_weight \(nan\) must be"),
        ({"dino_loss_weight": math.inf}, r"dino_loss_weight \(inf\) must be"),
        ({"dino_loss_weight": 0, "ibot_loss_weight": 0}, "are both 0: nothing would learn from the teacher"),
        (
            {"ibot_head": OWN_HEAD, "ibot_loss_weight": 0},
            "ibot_head has nothing to learn from with ibot_loss_weight: 0",
        ),
        ({"patch_embed_lr": -1}, r"patch_embed_lr \(-1\) must be at least 0"),
        ({"layer_decay": 0}, r"layer_decay \(0\) must be above 0 and at most 1"),
        ({"centering": "sinkhorn_knopp"}, r"centering \('sinkhorn_knopp'\) must be one of softmax, sinkhorn"),
        ({"student_temp": 0}, r"student_temp \(0\) must be positive"),
        ({"backbone": vit(mask_token=False)}, "VisionTransformer has no mask token .*mask_token: true"),
        ({"backbone": Pooled}, r"Pooled has no patches to hide .*ibot_loss_weight: 0"),
        ({"backbone": functools.partial(XCiT, 8, 3, 12, 2, 2)}, "XCiT has no patches to hide"),
        (
            {"backbone": Pooled, "ibot_loss_weight": 0, "layer_decay": 0.9},
            "Pooled has no blocks .*leave layer_decay at 1",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        method_of(**arguments)


def test_wrong_batches():
    method, batch = method_of(), batch_of()
    with pytest.raises(
        ValueError, match="DINOv2 needs 'masks', .*batch_transform BlockMasks, or .*ibot_loss_weight: 0"
    ):
        method({name: value for name, value in batch.items() if name != "masks"}, teacher_temp=TEMP)
    with pytest.raises(ValueError, match=r"masks \[3, 16\] must be \[images, patches\], a row for each of the 6"):
        method({**batch, "masks": batch["masks"][:3]}, teacher_temp=TEMP)
    with pytest.raises(ValueError, match=r"masks .*6, 15.* must be \[images, patches\], here .*6, 16"):
        method({**batch, "masks": batch["masks"][:, 1:]}, teacher_temp=TEMP)
    with pytest.raises(ValueError, match="DINOv2 needs 'global_crops', and the batch has only image"):
        method({"image": batch["global_crops"]}, teacher_temp=TEMP)
