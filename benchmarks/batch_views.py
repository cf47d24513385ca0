"""The time of the views of a batch of tensors: `BatchMultiCrop` against `MultiCrop` image by image, one thread each.

    python benchmarks/batch_views.py
    python benchmarks/batch_views.py --batch-size 16 --repeats 9

Both start from decoded 8-bit images and end with finished, normalised tensors. They take turns; counted is processor
time, shown are medians of the passes. On a GPU the batch is made there: then the clock's time is counted, and drawing
the views on the host is part of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import paddle
from PIL import Image

from passl.data.batch_views import BatchMultiCrop
from passl.data.multi_crop import MultiCrop

# Name, side of the images, arguments of MultiCrop.
CASES = (
    ("CIFAR, 2 x 32 + 6 x 16", 32, {"global_crops_size": 32, "local_crops_size": 16, "num_local_crops": 6}),
    ("CIFAR, 2 x 32", 32, {"global_crops_size": 32, "num_local_crops": 0}),
    ("224, 2 x 224 + 8 x 96", 224, {}),
)


def made_up_images(number: int, side: int) -> np.ndarray:
    """uint8 [number, side, side, 3], smooth as photos are"""
    small = np.random.default_rng(0).integers(0, 256, (number, side // 8, side // 8, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in small])


def measure(side: int, arguments: dict, batch_size: int, repeats: int) -> tuple[float, float]:
    """Milliseconds per image: (image by image, as a batch)."""
    images = made_up_images(batch_size, side)
    batch = paddle.to_tensor(images.transpose(0, 3, 1, 2))
    one_by_one, at_once = MultiCrop(**arguments), BatchMultiCrop(**arguments)
    on_gpu = batch.place.is_gpu_place()
    clock = time.perf_counter if on_gpu else time.process_time

    def single() -> None:
        rng = np.random.default_rng(0)
        views = [one_by_one(image, rng) for image in images]
        for name in views[0]:
            stacked = np.stack([those[name] for those in views], 1)
            paddle.to_tensor(stacked.reshape(-1, *stacked.shape[2:]))

    def batched() -> None:
        at_once(batch, np.random.default_rng(0))
        if on_gpu:
            paddle.device.synchronize()

    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for function, those in zip((single, batched), seconds):
            start = clock()
            function()
            those.append((clock() - start) / batch_size)
    first, second = (1e3 * statistics.median(those[1:]) for those in seconds)  # the first pass warms up
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"milliseconds per image, batches of {options.batch_size}, on {paddle.device.get_device()}")
    print(f"{'views':<26}{'MultiCrop':>12}{'BatchMultiCrop':>16}{'times as fast':>15}")
    for name, side, arguments in CASES:
        single, batched = measure(side, arguments, options.batch_size, options.repeats)
        print(f"{name:<26}{single:>12.2f}{batched:>16.2f}{single / batched:>15.2f}")


if __name__ == "__main__":
    main()
