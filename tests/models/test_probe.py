"""The linear probe against recorded features and losses of the official code."""

import functools
import json

import numpy as np
import paddle
import pytest
from paddle import nn

from passl.convert import load_torch
from passl.models import LinearProbe, VisionTransformer
from tests.models.weights import assert_close, load


def recorded_probe(reference, case: str, recorded) -> LinearProbe:
    meta = json.loads((reference / "eval_meta.json").read_text())[f"linear_{case}"]
    state = load_torch(reference / "linear_backbone_fullstyle.pth")
    state = state.get(meta["args"]["checkpoint_key"], state)
    state = {name.replace("module.", "").replace("backbone.", ""): value for name, value in state.items()}
    img_size = meta["arch"]["patch_size"] * round((state["pos_embed"].shape[1] - 1) ** 0.5)
    probe = LinearProbe(
        functools.partial(VisionTransformer, img_size, **meta["arch"]),
        num_classes=len(recorded[f"{case}/init_bias"]),
        n_last_blocks=meta["args"]["n_last_blocks"],
        avgpool=meta["args"]["avgpool_patchtokens"],
    )
    load(probe.backbone, state)
    load(probe.linear.linear, {"weight": recorded[f"{case}/init_weight"], "bias": recorded[f"{case}/init_bias"]})
    return probe


def images(recorded: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(recorded.astype("float32") * 2.0**-6 - 2.0)


def cases(recorded) -> list:
    found = sorted({key.split("/")[0] for key in recorded.files if "/" in key})
    assert found
    return found


@pytest.mark.smoke
def test_features(reference):
    recorded = np.load(reference / "linear.npz")
    for case in cases(recorded):
        probe = recorded_probe(reference, case, recorded)
        probe.train()
        for split in ("train", "val"):
            features = probe.features(images(recorded[f"{split}_images_u8"]))
            assert_close(features, recorded[f"{case}/{split}_features"], 2e-5, f"{case} {split} features")


def test_training(reference):
    """All steps of the official run: loss, final weights, and loss and accuracies on the validation set."""
    recorded = np.load(reference / "linear.npz")
    for case in cases(recorded):
        probe = recorded_probe(reference, case, recorded)
        optimizer = paddle.optimizer.Momentum(1.0, 0.9, parameters=probe.linear.parameters())
        losses, scores = [], []
        for order in recorded[f"{case}/order"]:
            size = int(recorded[f"{case}/batch_size"])
            for start in range(0, len(order), size):
                optimizer.set_lr(float(recorded[f"{case}/lr_per_step"][len(losses)]))
                loss = probe(batch(recorded, "train", order[start : start + size]))["loss"]
                loss.backward()
                optimizer.step()
                optimizer.clear_grad()
                losses.append(loss.item())
            probe.eval()
            with paddle.no_grad():
                outputs = probe(batch(recorded, "val", np.arange(len(recorded["val_labels"]))))
            scores.append([outputs[name].item() if name in outputs else np.nan for name in ("loss", "top1", "top5")])
        assert_close(losses, recorded[f"{case}/loss_per_step"], 1e-4, f"{case} loss")
        assert_close(probe.linear.linear.weight.t(), recorded[f"{case}/final_weight"], 1e-4, f"{case} weight")
        expected = recorded[f"{case}/val_loss_acc1_acc5_per_epoch"]
        assert np.allclose(scores, expected, rtol=0, atol=1e-4, equal_nan=True), case


def batch(recorded, split: str, rows: np.ndarray) -> dict:
    labels = paddle.to_tensor(recorded[f"{split}_labels"][rows])
    return {"image": images(recorded[f"{split}_images_u8"][rows]), "label": labels}


def vit(**arguments) -> VisionTransformer:
    return VisionTransformer(16, 8, embed_dim=6, depth=3, num_heads=2, **arguments)


def test_interleaving():
    """[CLS] of the earlier blocks, then [CLS] and mean patch token of the last one in turns."""
    probe = LinearProbe(vit, num_classes=3, n_last_blocks=2, avgpool=True)
    x = paddle.randn([2, 3, 16, 24])
    earlier, last = (tokens.numpy() for tokens in probe.backbone.get_intermediate_layers(x, 2))
    features = probe.features(x).numpy()
    assert features.shape == (2, 6 * 3)
    assert_close(features[:, :6], earlier[:, 0], 1e-6)
    assert_close(features[:, 6::2], last[:, 0], 1e-6)
    assert_close(features[:, 7::2], last[:, 1:].mean(1), 1e-6)


def test_backbone_stays_frozen_and_in_eval_mode():
    probe = LinearProbe(functools.partial(vit, drop_path_rate=0.9), num_classes=7, n_last_blocks=2)
    probe.train()
    before = {name: value.numpy().copy() for name, value in probe.backbone.state_dict().items()}
    x, label = paddle.randn([4, 3, 16, 16]), paddle.to_tensor([0, 1, 2, 6])
    assert (probe.features(x).numpy() == probe.features(x).numpy()).all()  # no drop path
    classifier = probe.linear.linear
    trained = [p for group in probe.param_groups() for p in group["params"]]
    assert [id(p) for p in trained] == [id(classifier.weight), id(classifier.bias)]
    optimizer = paddle.optimizer.Momentum(0.1, parameters=trained)
    first = probe({"image": x, "label": label})["loss"]
    first.backward()
    optimizer.step()
    assert probe({"image": x, "label": label})["loss"].item() < first.item()
    for name, value in probe.backbone.state_dict().items():
        assert (value.numpy() == before[name]).all(), name
    assert "backbone.cls_token" in probe.state_dict()


def test_rates():
    probe = LinearProbe(vit, num_classes=6, n_last_blocks=1)
    logits = np.array([[6, 5, 4, 3, 2, 1], [1, 6, 5, 4, 3, 2], [1, 2, 3, 4, 5, 6]], "float32")
    probe.predict = lambda images: paddle.to_tensor(logits)
    outputs = probe({"image": None, "label": paddle.to_tensor([0, 2, 0])})
    assert_close(outputs["top1"].item(), 100 / 3, 1e-4)
    assert_close(outputs["top5"].item(), 200 / 3, 1e-4)
    assert outputs["metric"].item() == outputs["top1"].item()
    assert outputs["CELoss"].item() == outputs["loss"].item()


def test_fewer_than_five_classes_have_no_top5():
    probe = LinearProbe(vit, num_classes=2, n_last_blocks=1)
    outputs = probe({"image": paddle.zeros([2, 3, 16, 16]), "label": paddle.to_tensor([0, 1])})
    assert "top1" in outputs
    assert "top5" not in outputs


def test_convnet():
    class Pooled(nn.Layer):
        embed_dim = 3

        def forward(self, x):
            return x.mean([2, 3])

    assert LinearProbe(Pooled, num_classes=4).predict(paddle.zeros([2, 3, 5, 5])).shape == [2, 4]


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"num_classes \(0\) must be at least 1"):
        LinearProbe(vit, num_classes=0)
    for n_last_blocks in (0, 4):
        expected = rf"n_last_blocks \({n_last_blocks}\) must be between 1 and .* blocks \(3\)"
        with pytest.raises(ValueError, match=expected):
            LinearProbe(vit, num_classes=2, n_last_blocks=n_last_blocks)
    with pytest.raises(ValueError, match="the backbone Flatten has no embed_dim"):
        LinearProbe(nn.Flatten, num_classes=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": [0]}, "needs 'image', and the batch has only label: .* yields one image"),
        ({"image": [0], "index": [0]}, "needs 'label', and the batch has only image, index: .*ImageFolder.* csv"),
        ({}, "the batch has only nothing"),
    ],
)
def test_a_batch_without_images_or_labels(given, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(vit, num_classes=2, n_last_blocks=1)({key: paddle.to_tensor(value) for key, value in given.items()})


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2]])
def test_labels_beyond_the_classes(labels):
    probe = LinearProbe(vit, num_classes=3, n_last_blocks=1)
    x = paddle.zeros([2, 3, 16, 16])
    probe({"image": x, "label": paddle.to_tensor([0, 2])})
    with pytest.raises(ValueError, match=rf"in 0 to 2 .*labels from {labels[0]} to {labels[1]}: set num_classes"):
        probe({"image": x, "label": paddle.to_tensor(labels)})
