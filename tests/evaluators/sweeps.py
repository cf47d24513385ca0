"""Small linear sweeps for tests."""

from __future__ import annotations

import paddle

from passl.data.datasets import ImageFolder
from passl.data.samples import Samples
from passl.data.transforms import ToTensor
from passl.evaluators import LinearSweep
from passl.models import VisionTransformer


def vit() -> VisionTransformer:
    return VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=2)


def untrained() -> VisionTransformer:
    paddle.seed(0)
    network = vit()
    network.eval()
    return network


def sweep(folder, transform=None, **arguments) -> LinearSweep:
    sets = [ImageFolder(folder / split, transform or ToTensor()) for split in ("train", "val")]
    small = {"n_last_blocks": [1, 3], "learning_rates": [0.01, 1.0], "epochs": 4, "train_batch_size": 4}
    return LinearSweep(*sets, **{**small, **arguments})


class Arrays(Samples):
    def __init__(self, arrays, labels):
        super().__init__(labels, [], 10)
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays)

    def describe(self, index):
        return str(index)

    def content(self, index, rng):
        return {"image": self.arrays[index]}
