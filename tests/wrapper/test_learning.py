"""A wrapped model learns: k-NN on drawn stripes rises, with either version."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import Tensor, nn

from passl import DINOConf, DINOWrapper
from passl.evaluators.knn import knn_classify

SIZE, BATCH, EPOCHS = 32, 32, 4
DIRECTIONS = 6  # of stripes, to a class each


class SmallNet(nn.Layer):
    """Three convolutions. [B, 3, H, W] -> [B, 64]"""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2D(before, after, 3, stride=2, padding=1), nn.BatchNorm2D(after), nn.ReLU())
                for before, after in zip(widths, widths[1:])
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean([2, 3])


def pictures(per_class: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """uint8 [N, 3, H, W] and the labels [N]."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(DIRECTIONS), per_class)
    y, x = np.mgrid[:SIZE, :SIZE]
    drawn = []
    for label in labels:
        angle = np.pi * label / DIRECTIONS
        across = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * (rng.uniform(0.1, 0.2) * across + rng.random()))
        ends = rng.random((2, 1, 1, 3))
        drawn.append(ends[0] + (ends[1] - ends[0]) * (wave[..., None] + 1) / 2 + rng.normal(0, 0.1, (SIZE, SIZE, 3)))
    images = (np.stack(drawn).clip(0, 1) * 255).astype(np.uint8)
    return paddle.to_tensor(images.transpose(0, 3, 1, 2)), labels


def knn(wrapper: DINOWrapper, train: tuple[Tensor, np.ndarray], test: tuple[Tensor, np.ndarray]) -> float:
    features = [wrapper(images, mode="val").numpy() for images, _ in (train, test)]
    known, asked = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in features)
    votes = knn_classify(known, train[1], asked, k=[10])[10]
    return float((votes.argmax(1) == test[1]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_knn_rises(version):
    paddle.seed(0)
    train, test = pictures(150, seed=0), pictures(50, seed=1)
    length = len(train[1]) // BATCH
    conf = DINOConf(
        version=version,
        global_crop_size=SIZE,
        local_crop_size=SIZE // 2,
        local_crops_number=2,
        global_crops_scale=(0.5, 1.0),
        local_crops_scale=(0.2, 0.5),
        flip_prob=0.0,
        jitter_prob=1.0,
        saturation=0.8,
        hue=0.5,
        gray_prob=0.4,
        global_solarize_probs=(0.0, 0.0),
        momentum_teacher=0.98,
        warmup_teacher_temp=0.03,
        teacher_temp=0.03,
        freeze_last_layer=EPOCHS,
        out_dim=512,
        hidden_dim=256,
        bottleneck_dim=64,
        epochs=EPOCHS,
        len_train_loader=length,
    )
    wrapper = DINOWrapper(SmallNet(), conf)
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=wrapper.parameters())
    before = knn(wrapper, train, test)
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(train[1]))
        for number in range(length):
            rows = order[number * BATCH : (number + 1) * BATCH]
            _, loss = wrapper(train[0][paddle.to_tensor(rows)], epoch)
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            wrapper.ema_update(epoch * length + number)
        print(version, epoch, round(loss.item(), 3), round(before, 3), round(knn(wrapper, train, test), 3), flush=True)
    assert knn(wrapper, train, test) > before + 0.05
