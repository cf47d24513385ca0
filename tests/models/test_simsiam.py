"""SimSiam: its loss, its heads, and a run of it by the engine."""

from __future__ import annotations

import functools
import re

import numpy as np
import paddle
import pytest
from paddle import nn

from passl.log import read_metrics
from passl.models import SimSiam, VisionTransformer
from passl.models.simsiam.method import output_std, projector, symmetric_loss
from tests.engine import tiny

MODEL = """
Model:
  name: SimSiam
  backbone: {{name: VisionTransformer, img_size: 16, patch_size: 8, embed_dim: 12, depth: 2, num_heads: 2}}
  out_dim: 12
  hidden_dim: 6
  num_layers: 2
"""
# Of the tiny run of DINO another model, without the schedules that are DINO's.
PRETRAIN = re.sub(r"Model:.*?(?=Schedules:)", MODEL.strip("\n") + "\n", tiny.PRETRAIN, flags=re.DOTALL)
PRETRAIN = "\n".join(line for line in PRETRAIN.splitlines() if "teacher_" not in line)


def numpy_loss(predictions: list[np.ndarray], projections: list[np.ndarray]) -> float:
    """Equation 4 of the paper, in words: half the sum of the negative cosines, averaged over the images."""
    pairs = [*zip(predictions[0], projections[1]), *zip(predictions[1], projections[0])]
    cosines = [p.dot(z) / np.sqrt(p.dot(p) * z.dot(z)) for p, z in pairs]
    return -0.5 * sum(cosines) / len(predictions[0])


@pytest.mark.smoke
@pytest.mark.parametrize(("batch", "dim"), [(1, 2), (4, 7), (32, 128)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_loss(batch, dim, scale, float64):
    rng = np.random.default_rng(batch)
    values = [scale * rng.normal(size=(batch, dim)) for _ in range(4)]
    tensors = [paddle.to_tensor(value, stop_gradient=False) for value in values]
    loss = symmetric_loss(tensors[:2], tensors[2:])
    assert loss.item() == pytest.approx(numpy_loss(values[:2], values[2:]), abs=1e-12)
    loss.backward()
    assert all(z.grad is None for z in tensors[2:])
    step = 1e-6 * scale
    for place in ((0, 0), (batch - 1, dim - 1)):
        for which in (0, 1):
            moved = [value.copy() for value in values]
            moved[which][place] += step
            slope = (numpy_loss(moved[:2], moved[2:]) - numpy_loss(values[:2], values[2:])) / step
            assert tensors[which].grad.numpy()[place] * scale == pytest.approx(slope * scale, abs=1e-5)


def test_the_best_and_the_worst_loss():
    z = paddle.randn([5, 8])
    assert symmetric_loss([3 * z, z], [z, 2 * z]).item() == pytest.approx(-1, abs=1e-6)
    assert symmetric_loss([z, z], [-z, -z]).item() == pytest.approx(1, abs=1e-6)


def test_output_std_tells_of_collapse():
    paddle.seed(0)
    assert output_std(paddle.randn([4000, 16])).item() == pytest.approx(1, abs=0.02)
    assert output_std(paddle.randn([1, 16]).expand([50, 16])).item() == pytest.approx(0, abs=1e-3)


def test_heads_are_those_of_the_paper():
    heads = projector(6, 10, 3)
    assert [type(layer).__name__ for layer in heads] == [
        *("Linear", "BatchNorm1D", "ReLU"),
        *("Linear", "BatchNorm1D", "ReLU"),
        *("Linear", "BatchNorm1D"),
    ]
    method = SimSiam(functools.partial(VisionTransformer, 16, 8, 3, 12, 2, 2), out_dim=10, hidden_dim=4)
    shapes = {name: list(p.shape) for name, p in method.named_parameters() if p.ndim > 1 and "backbone" not in name}
    assert list(shapes.values()) == [[12, 10], [10, 10], [10, 10], [10, 4], [4, 10]]
    biases = [name for name, p in method.named_parameters() if name.endswith("bias") and not p.stop_gradient]
    # Of the projector's two inner batch norms; of the predictor's batch norm and last layer.
    assert [name for name in biases if "projector" in name] == ["projector.1.bias", "projector.4.bias"]
    assert [name for name in biases if "predictor" in name] == ["predictor.1.bias", "predictor.3.bias"]
    heads(paddle.randn([8, 6]) * 5 + 3)
    output = heads(paddle.randn([64, 6]) * 5 + 3)
    np.testing.assert_allclose(output.mean(0).numpy(), 0, atol=1e-4)
    np.testing.assert_allclose(output.std(0).numpy(), 1, atol=0.05)


class Flat(nn.Layer):
    """A small network without batch norm over images [B, 3, 4, 4]."""

    embed_dim = 32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 32))

    def forward(self, images):
        return self.layers(images)


def test_a_batch_without_views():
    method = SimSiam(Flat, out_dim=16, hidden_dim=8)
    with pytest.raises(ValueError, match="the batch has only image: .* MultiCrop with num_local_crops: 0"):
        method({"image": paddle.zeros([2, 3, 4, 4])})


def test_killed_and_resumed_run_is_bit_identical(tmp_path):
    tiny.write_images(tmp_path)
    config = tiny.write_config(tmp_path, PRETRAIN, "pretrain.yaml")
    folders = [tiny.overrides(Global__output_dir=tmp_path / name) for name in ("whole", "killed")]
    whole = tiny.run(tiny.TRAIN, "-c", config, *folders[0])
    assert whole.returncode == 0, whole.stderr
    killed = tiny.run(tiny.KILLED_AT.format(step=5) + tiny.TRAIN, "-c", config, *folders[1])
    assert killed.returncode == -9, killed.stderr
    resumed = tiny.run(tiny.TRAIN, "-c", config, *folders[1], "-o", "Global.checkpoint=auto")
    assert resumed.returncode == 0, resumed.stderr
    tiny.assert_same_checkpoint(tmp_path / "whole/SimSiam/latest", tmp_path / "killed/SimSiam/latest")
    rows = list(read_metrics(tmp_path / "whole/SimSiam/metrics.jsonl"))
    assert all({"loss", "output_std"} <= set(row) for row in rows if "loss" in row)
