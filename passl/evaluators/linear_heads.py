"""Many linear classifiers on the same features, trained side by side with the recipe of the official linear probe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import paddle

_CHUNK = 2048  # rows whose logits are held at a time


class LinearHeads:
    """K classifiers of features [B, W] in C classes, that differ in learning rate and weight decay only.

    All start from the same weights, see the same batches, and are trained by SGD with momentum as PyTorch's: their
    weights are one matrix, and a step is three products of matrices.

    Args:
        rates, decays: [K]; decay is added to the gradient of weights, not of biases.
        weight: [W, C], of all at first; bias: [C].
    """

    def __init__(
        self,
        rates: Sequence[float],
        decays: Sequence[float],
        weight: np.ndarray,
        bias: np.ndarray,
        momentum: float = 0.9,
    ) -> None:
        count, self.num_classes = len(rates), len(bias)
        self.count = count
        self.momentum = momentum
        self._rates = self._by_column(rates)
        self._decays = self._by_column(decays) if any(decays) else None
        self.weight = paddle.to_tensor(np.tile(weight.astype(np.float32), (1, count)))  # [W, K * C]
        self.bias = paddle.to_tensor(np.tile(bias.astype(np.float32), count)[None])  # [1, K * C]
        self._velocities = [paddle.zeros_like(self.weight), paddle.zeros_like(self.bias)]

    def _by_column(self, values: Sequence[float]) -> paddle.Tensor:
        return paddle.to_tensor(np.repeat(np.asarray(values, np.float32), self.num_classes)[None])

    @paddle.no_grad()
    def step(self, features: np.ndarray, labels: np.ndarray, factor: float = 1.0) -> paddle.Tensor:
        """One step on a batch [B, W] with labels [B]; the learning rates are multiplied by ``factor``.

        Returns:
            The mean cross-entropy of each classifier before the step, [K].
        """
        x = paddle.to_tensor(features)
        shifted, scale = self._shifted(x)
        target = paddle.nn.functional.one_hot(paddle.to_tensor(labels), self.num_classes).unsqueeze(1)
        # Written out, as loss and gradient share the exponentials; Paddle's own softmax stops at -64.
        losses = (scale.log().squeeze(-1) - (shifted * target).sum(-1)).mean(0)
        gradient = ((shifted.exp() / scale - target) / len(labels)).reshape([len(labels), -1])
        of_weight = paddle.matmul(x, gradient, transpose_x=True)
        if self._decays is not None:
            of_weight = of_weight + self._decays * self.weight
        moves = self._rates * factor
        for number, part in enumerate((of_weight, gradient.sum(0, keepdim=True))):
            velocity = self._velocities[number] * self.momentum + part
            self._velocities[number] = velocity
            if number == 0:
                self.weight = self.weight - moves * velocity
            else:
                self.bias = self.bias - moves * velocity
        return losses

    def _shifted(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Logits [B, K, C] less the largest of each row, and the sum of their exponentials [B, K, 1]."""
        logits = (paddle.matmul(x, self.weight) + self.bias).reshape([len(x), self.count, self.num_classes])
        shifted = logits - logits.max(-1, keepdim=True)
        return shifted, shifted.exp().sum(-1, keepdim=True)

    @paddle.no_grad()
    def rates(self, features: np.ndarray, labels: np.ndarray, topk: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Top-k accuracy in percent [K, len(topk)] and mean cross-entropy [K] on features [N, W] with labels [N]."""
        hits, loss = np.zeros((self.count, len(topk))), np.zeros(self.count)
        most = min(max(topk), self.num_classes)
        for start in range(0, len(labels), _CHUNK):
            target = paddle.to_tensor(labels[start : start + _CHUNK])
            shifted, scale = self._shifted(paddle.to_tensor(features[start : start + _CHUNK]))
            picked = (shifted * paddle.nn.functional.one_hot(target, self.num_classes).unsqueeze(1)).sum(-1)
            loss += (scale.log().squeeze(-1) - picked).sum(0).numpy()
            right = (paddle.topk(shifted, most)[1] == target.reshape([-1, 1, 1])).numpy()
            for number, k in enumerate(topk):
                hits[:, number] += right[..., :k].any(-1).sum(0)
        return 100.0 * (hits / len(labels)), loss / len(labels)

    def head(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight [W, C] and bias [C] of one of the classifiers."""
        columns = slice(number * self.num_classes, (number + 1) * self.num_classes)
        return self.weight.numpy()[:, columns], self.bias.numpy()[0, columns]


def cosine_by_epoch(epochs: int) -> list[float]:
    """Factors of the official schedule: half a cosine to 0, one value for each epoch."""
    return [0.5 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]
