"""The two code blocks of the README's section, word for word."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

README = Path(__file__).parents[2] / "README.md"
TITLE = "## DINO for any backbone"


def blocks() -> list[str]:
    text = README.read_text(encoding="utf-8")
    section = text[text.index(f"\n{TITLE}\n") :].split("\n## ")[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def given() -> dict[str, object]:
    """What the blocks take for granted: a model, images, a criterion and a data loader."""

    class Model(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(nn.Conv2D(3, 8, 8, stride=8), nn.BatchNorm2D(8), nn.ReLU())
            self.layer4 = nn.Sequential(nn.Conv2D(8, 16, 3, stride=2), nn.ReLU())
            self.fc = nn.Linear(16, 10)

        def forward(self, images):
            return self.fc(self.layer4(self.layer1(images)).mean([2, 3]))

    paddle.seed(0)
    images = paddle.rand([2, 3, 64, 64])
    return {
        "model": Model(),
        "images": images,
        "criterion": lambda output: output.square().mean(),
        "train_loader": [images, images],
    }


def test_there_are_two_blocks():
    assert len(blocks()) == 2


def test_the_usage_trains_the_model():
    names = given()
    before = names["model"].layer1[0].weight.numpy()
    exec(blocks()[0], names)
    assert names["original_output"].shape == [2, 16]
    assert np.isfinite(names["loss"].item())
    assert not np.array_equal(names["model"].layer1[0].weight.numpy(), before)
    assert names["dino_model"].next_step.item() == 2


def test_the_custom_configuration_is_dinov2_of_these_sizes():
    names = given()
    sizes = []
    names["model"].layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    exec(blocks()[1], names)
    assert [4, 3, 480, 640] in sizes
    assert [16, 3, 240, 320] in sizes
    assert names["dino_model"].configs.version == "v2"
    assert set(names["dino_model"].losses) == {"loss", "dino_loss", "koleo_loss"}
    assert names["model"].layer1[0].weight.grad is not None
