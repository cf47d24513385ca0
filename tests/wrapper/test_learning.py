"""A wrapped model learns: k-NN on drawn stripes rises, with either version."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import Tensor, nn

from passl import DINOConf, DINOWrapper
from passl.evaluators.knn import knn_classify

SIZE, BATCH, EPOCHS = 32, 32, 2
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


def pictures(count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """uint8 [N, 3, H, W] of stripes in two colours, and the labels [N]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, DIRECTIONS, count)
    y, x = np.mgrid[:SIZE, :SIZE]
    drawn = []
    for label in labels:
        angle = np.pi * label / DIRECTIONS
        across = x * np.cos(angle) + y * np.sin(angle)
        is_even = (np.sin(2 * np.pi * (0.15 * across + rng.random())) > 0)[..., None]
        low, high = 0.4 * rng.random(3), 0.6 + 0.4 * rng.random(3)
        swapped = rng.random(3) < 0.5  # in each colour by itself
        drawn.append(np.where(is_even ^ swapped, high, low) + rng.normal(0, 0.1, (SIZE, SIZE, 3)))
    images = (np.stack(drawn).clip(0, 1) * 255).astype(np.uint8)
    return paddle.to_tensor(images.transpose(0, 3, 1, 2)), labels


def knn(wrapper: DINOWrapper, train: tuple[Tensor, np.ndarray], test: tuple[Tensor, np.ndarray]) -> float:
    features = [wrapper(images, mode="val").numpy() for images, _ in (train, test)]
    known, asked = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in features)
    votes = knn_classify(known, train[1], asked, k=[10])[10]
    return float((votes.argmax(1) == test[1]).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"version": "v2", "centering": "sinkhorn", "koleo_loss_weight": 1.0, "teacher_temp": 0.04}],
    ids=["v1", "v2"],
)
def test_knn_rises(settings):
    paddle.seed(0)
    train, test = pictures(800, seed=0), pictures(600, seed=1)
    length = len(train[1]) // BATCH
    conf = DINOConf(
        global_crop_size=SIZE,
        local_crop_size=SIZE // 2,
        local_crops_number=2,
        global_crops_scale=(0.5, 1.0),
        local_crops_scale=(0.2, 0.5),
        flip_prob=0.0,  # a mirrored direction is another
        jitter_prob=1.0,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.5,
        gray_prob=0.4,
        global_solarize_probs=(0.3, 0.3),
        momentum_teacher=0.98,
        out_dim=512,
        hidden_dim=256,
        bottleneck_dim=64,
        epochs=EPOCHS,
        len_train_loader=length,
        **settings,
    )
    wrapper = DINOWrapper(SmallNet(), conf)
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=wrapper.parameters())
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
    after = knn(wrapper, train, test)
    assert after > before + 0.03, (before, after)
