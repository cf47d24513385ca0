"""A small model of a user's own, and settings of a wrapper that take no time."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from passl import DINOConf, DINOWrapper

IMAGE, CROP = 32, 16


class SmallNet(nn.Layer):
    """Two convolutions and a classifier. [B, 3, H, W] -> logits [B, 10]; its features are 12 wide."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2D(channels, 6, 3, stride=2), nn.BatchNorm2D(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2D(6, 12, 3, stride=2), nn.ReLU())
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(self.stem(images)).mean([2, 3])))


class FixedViT(nn.Layer):
    """A transformer for images of 32 pixels and no others, with a classifier. [B, 3, 32, 32] -> [B, 10]"""

    def __init__(self, image_size: int = IMAGE, dropout: float = 0.1) -> None:
        super().__init__()
        self.patches = nn.Conv2D(3, 12, 8, stride=8)
        self.cls_token = self.create_parameter([1, 1, 12])
        self.pos_embed = self.create_parameter([1, 1 + (image_size // 8) ** 2, 12])
        self.block = nn.TransformerEncoderLayer(12, 2, 24, dropout=dropout)
        self.head = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose([0, 2, 1])
        tokens = paddle.concat([self.cls_token.expand([images.shape[0], 1, 12]), patches], axis=1)
        return self.head(self.block(tokens + self.positions())[:, 0])

    def positions(self) -> Tensor:
        return self.pos_embed


def small_conf(**settings: Any) -> DINOConf:
    sizes = {"global_crop_size": IMAGE, "local_crop_size": CROP, "local_crops_number": 2}
    head = {"out_dim": 16, "hidden_dim": 8, "bottleneck_dim": 4, "freeze_last_layer": 0}
    return DINOConf(**{**sizes, **head, **settings})


def small_wrapper(**settings: Any) -> DINOWrapper:
    paddle.seed(0)
    return DINOWrapper(SmallNet(), small_conf(**settings))


def batch(size: int = 4, channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 [B, C, 40, 40]"""
    rng = np.random.default_rng(seed)
    return paddle.to_tensor(rng.integers(0, 256, (size, channels, 40, 40), dtype=np.uint8))


def crops(size: int = 4, seed: int = 0, num_local: int = 2) -> dict[str, Tensor]:
    """Views as MultiCrop makes them."""
    rng = np.random.default_rng(seed)
    shapes = {"global_crops": (2 * size, 3, IMAGE, IMAGE), "local_crops": (num_local * size, 3, CROP, CROP)}
    return {name: paddle.to_tensor(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


def train(wrapper: nn.Layer, steps: int, start: int = 0, rate: float = 1e-2) -> list[float]:
    """The losses of so many steps of a plain loop."""
    optimizer = paddle.optimizer.SGD(rate, parameters=wrapper.parameters())
    losses = []
    for step in range(start, start + steps):
        _, loss = wrapper(batch(seed=step))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        wrapper.ema_update(step)
        losses.append(loss.item())
    return losses
