"""Residual networks (He et al. 2016) with torchvision's names, so that its weight files fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import paddle.nn.functional as F
from paddle import Tensor, nn

from passl.models.layers import BatchNorm2D, check_positive, torch_uniform
from passl.registry import BACKBONES


def _conv(in_dim: int, out_dim: int, kernel_size: int, stride: int = 1) -> nn.Conv2D:
    """A convolution without bias that keeps the size (divided by the stride), initialised as in He et al. 2015."""
    # fan_out: the variance of the gradients is kept, not that of the features.
    normal = nn.initializer.Normal(std=math.sqrt(2.0 / (out_dim * kernel_size**2)))
    return nn.Conv2D(
        in_dim, out_dim, kernel_size, stride, padding=kernel_size // 2, weight_attr=normal, bias_attr=False
    )


def _projection(in_dim: int, out_dim: int, stride: int) -> Optional[nn.Sequential]:
    """What gives a block's input the shape of its output; None where it has that shape."""
    if stride == 1 and in_dim == out_dim:
        return None
    return nn.Sequential(_conv(in_dim, out_dim, 1, stride), BatchNorm2D(out_dim))


class BasicBlock(nn.Layer):
    """Two 3 x 3 convolutions. x: [B, in_dim, H, W] -> [B, width, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, in_dim: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(in_dim, width, 3, stride)
        self.bn1 = BatchNorm2D(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = BatchNorm2D(width)
        self.downsample = _projection(in_dim, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Layer):
    """1 x 1, 3 x 3, 1 x 1 convolutions. x: [B, in_dim, H, W] -> [B, 4*width, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, in_dim: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_dim = width * self.expansion
        self.conv1 = _conv(in_dim, width, 1)
        self.bn1 = BatchNorm2D(width)
        # The paper has the stride in conv1; torchvision, and therefore the published weights, here.
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = BatchNorm2D(width)
        self.conv3 = _conv(width, out_dim, 1)
        self.bn3 = BatchNorm2D(out_dim)
        self.downsample = _projection(in_dim, out_dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


@BACKBONES.register()
class ResNet(nn.Layer):
    """Residual network that ends in the global average of its features; the default is ResNet-50.

    depths: the number of blocks at each of the four resolutions (1/4, 1/8, 1/16 and 1/32 of the image's).
    bottleneck: blocks of three convolutions with outputs 4 times as wide, or of two.
    width: channels of the first stage's inner convolutions; it doubles from stage to stage.
    num_classes: 0 gives the features, as a backbone has to; else a linear classifier `fc` follows them.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = True,
        width: int = 64,
        in_chans: int = 3,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes ({num_classes}) must be at least 0, which means no classifier")
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths ({list(depths)}) must be four numbers of blocks, each at least 1")
        check_positive(width=width, in_chans=in_chans)
        block = Bottleneck if bottleneck else BasicBlock
        self.embed_dim = 8 * width * block.expansion
        self.conv1 = _conv(in_chans, width, 7, stride=2)
        self.bn1 = BatchNorm2D(width)
        in_dim = width
        for stage, depth in enumerate(depths):
            stage_width = width * 2**stage
            blocks = [block(in_dim, stage_width, stride=1 if stage == 0 else 2)]
            in_dim = stage_width * block.expansion
            blocks += [block(in_dim, stage_width) for _ in range(depth - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        uniform = torch_uniform(in_dim)
        self.fc = nn.Linear(in_dim, num_classes, uniform, uniform) if num_classes else None

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> the globally averaged features [B, embed_dim] or the logits [B, num_classes]; any H and W."""
        features = F.adaptive_avg_pool2d(self.feature_map(images), 1).flatten(1)
        return features if self.fc is None else self.fc(features)

    def feature_map(self, images: Tensor) -> Tensor:
        """The features before they are averaged: [B, C, H, W] -> [B, embed_dim, H/32, W/32], sizes rounded up."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x


@BACKBONES.register()
def resnet18(in_chans: int = 3, num_classes: int = 0) -> ResNet:
    """ResNet-18: 512 wide, 11.2 M parameters."""
    return ResNet((2, 2, 2, 2), bottleneck=False, in_chans=in_chans, num_classes=num_classes)


@BACKBONES.register()
def resnet34(in_chans: int = 3, num_classes: int = 0) -> ResNet:
    """ResNet-34: 512 wide, 21.3 M parameters."""
    return ResNet((3, 4, 6, 3), bottleneck=False, in_chans=in_chans, num_classes=num_classes)


@BACKBONES.register()
def resnet50(in_chans: int = 3, num_classes: int = 0) -> ResNet:
    """ResNet-50: 2048 wide, 23.5 M parameters."""
    return ResNet((3, 4, 6, 3), in_chans=in_chans, num_classes=num_classes)


@BACKBONES.register()
def resnet101(in_chans: int = 3, num_classes: int = 0) -> ResNet:
    """ResNet-101: 2048 wide, 42.5 M parameters."""
    return ResNet((3, 4, 23, 3), in_chans=in_chans, num_classes=num_classes)


@BACKBONES.register()
def resnet152(in_chans: int = 3, num_classes: int = 0) -> ResNet:
    """ResNet-152: 2048 wide, 58.1 M parameters."""
    return ResNet((3, 8, 36, 3), in_chans=in_chans, num_classes=num_classes)
