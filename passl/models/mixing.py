"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of whole batches, as timm mixes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from passl.models.functional import tensor_of


@dataclass(frozen=True)
class Mixing:
    """Each image is mixed with the one at the same place from the end of the batch, all in the same way.

    Attributes:
        mixup_alpha, cutmix_alpha: of the Beta distribution of the first image's share; 0: never in this way.
        mix_prob: of mixing a batch at all.
        switch_prob: of CutMix, where both are allowed.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} ({value}) must be a number from 0, which means never")
        for name in ("mix_prob", "switch_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} ({value}) must be a probability between 0 and 1")

    def is_on(self) -> bool:
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
        """images: [B, C, H, W] -> the same shape, and the share of each image's own label; the rest is that of
        ``label.flip(0)``.
        """
        if rng.random() >= self.mix_prob:
            return images, 1.0
        cuts = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or rng.random() < self.switch_prob)
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        share = float(rng.beta(alpha, alpha))
        others = images.flip([0])
        if not cuts:
            return images * share + others * (1.0 - share), share
        height, width = images.shape[-2:]
        top, bottom, left, right = cut_box(height, width, share, rng)
        inside = np.zeros((1, 1, height, width), bool)
        inside[..., top:bottom, left:right] = True
        mixed = paddle.where(tensor_of(inside).expand(images.shape), others, images)
        return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def cut_box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box of ``1 - share`` of the area in the proportions of the image; its middle
    lies anywhere, and what sticks out is cut off.
    """
    side = math.sqrt(1.0 - share)
    box_height, box_width = int(height * side), int(width * side)
    middle_y, middle_x = int(rng.integers(height)), int(rng.integers(width))
    top, left = middle_y - box_height // 2, middle_x - box_width // 2
    bottom, right = top + box_height // 2 * 2, left + box_width // 2 * 2
    return max(top, 0), min(bottom, height), max(left, 0), min(right, width)
