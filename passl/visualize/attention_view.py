"""Which of a network's maps are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import numpy as np
import paddle
from paddle import Tensor, nn

from passl.models.tokens import attention_rollout, cls_attention, patch_features
from passl.visualize.attention_image import Prepared


@dataclass(frozen=True)
class View:
    """Attention maps of a block.

    Attributes:
        layer: number of the block; negative from the end.
        head: its number, or "mean", or "all".
        rollout: attention through all blocks up to ``layer`` in place of that of one; its heads are averaged.
    """

    layer: int = -1
    head: Union[int, str] = "all"
    rollout: bool = False

    def maps(self, backbone: nn.Layer, images: Tensor) -> tuple[np.ndarray, list[str]]:
        """images [B, C, H, W] -> float32 [B, maps, h, w], and the name of each map: head0, mean, rollout.

        Raises:
            ValueError: the backbone has no such attention, block or head, or gives NaN.
        """
        if self.rollout:
            return _finite(attention_rollout(backbone, images, self.layer).unsqueeze(1)), ["rollout"]
        maps = _finite(cls_attention(backbone, images, self.layer))
        if self.head == "all":
            return maps, [f"head{head}" for head in range(maps.shape[1])]
        if self.head == "mean":
            return maps.mean(1, keepdims=True), ["mean"]
        if not 0 <= self.head < maps.shape[1]:
            raise ValueError(f"head ({self.head}) must be from 0 to {maps.shape[1] - 1}, or all, or mean")
        return maps[:, [self.head]], [f"head{self.head}"]


def similarity(
    backbone: nn.Layer, prepared: Prepared, x: float, y: float, layer: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """How alike the patches of an image are to the one at a place, by the cosine of their features.

    x, y: the place, in pixels of the original image.

    Returns:
        float32 [h, w], 1 at the patch itself; and (row, column) of that patch.

    Raises:
        ValueError: the place is outside of the image, or the backbone has no features of patches or no such block, or
            gives NaN.
    """
    features = patch_features(backbone, paddle.to_tensor(prepared.tensor[None]), layer)[0].astype("float32")
    row, column = prepared.patch_at(x, y, tuple(features.shape[:2]))
    features = features / paddle.sqrt((features * features).sum(-1, keepdim=True)).clip(min=1e-12)
    cosines = paddle.matmul(features, features[row, column].unsqueeze(1)).squeeze(-1)
    return _finite(cosines), (row, column)


def _finite(values: Tensor) -> np.ndarray:
    """The values, which a black picture would not show to be NaN."""
    array = values.numpy()
    if not np.isfinite(array).all():
        raise ValueError("the network gives NaN: its weights, or the image, hold values that are not finite")
    return array
