"""One frame of label propagation (DAVIS 2017) beside the official code's formulas on PyTorch.

    python benchmarks/label_propagation.py --grid 60x104

The patches of a frame ask those of the first and of the seven latest frames, as in `VideoSegmentation`; the features
are random. The official code computes the similarities of all pairs of patches and then drops those that are too far
apart. Needs PyTorch beside Paddle; without it only passl is measured. One thread; the fastest repetition counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import numpy as np
import paddle

from passl.evaluators.label_propagation import LabelPropagation

FRAMES, RADIUS, TOPK, TEMPERATURE = 7, 12, 5, 0.1


def passl_step(features: np.ndarray, labels: np.ndarray) -> Callable[[], np.ndarray]:
    """features [F, h, w, D], labels [h, w, C]: all but the last frame are known."""
    frames = [paddle.to_tensor(frame) for frame in features]
    propagation = LabelPropagation(frames[0], paddle.to_tensor(labels), FRAMES, RADIUS, TOPK, TEMPERATURE)
    for frame in frames[1:-1]:
        propagation.step(frame)
    return lambda: propagation.step(frames[-1]).numpy()


def torch_step(features: np.ndarray, labels: np.ndarray) -> Callable[[], np.ndarray]:
    import torch

    torch.set_num_threads(1)
    _, height, width, dim = features.shape
    rows, columns = np.divmod(np.arange(height * width), width)
    near = (np.abs(rows[:, None] - rows) <= RADIUS) & (np.abs(columns[:, None] - columns) <= RADIUS)
    near = torch.tensor(near.astype(np.float32))
    unit = torch.nn.functional.normalize(torch.tensor(features).reshape(len(features), -1, dim), dim=2)
    known = torch.tensor(labels).reshape(1, height * width, -1).repeat(len(features) - 1, 1, 1).flatten(0, 1)

    def step() -> np.ndarray:
        affinity = torch.exp(unit[:-1] @ unit[-1].T / TEMPERATURE)  # [F, sources, targets]
        affinity *= near
        affinity = affinity.flatten(0, 1)
        affinity[affinity < torch.topk(affinity, TOPK, dim=0)[0][-1]] = 0
        return (known.T @ (affinity / affinity.sum(0))).T.numpy()

    return step


def fastest(step: Callable[[], object], repeats: int) -> float:
    """Seconds."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="30x52", help="rows x columns of patches: 480p with patches of 16 pixels")
    parser.add_argument("--width", type=int, default=384, help="of the features")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    height, width = map(int, arguments.grid.split("x"))
    random = np.random.default_rng(0)
    features = random.standard_normal((FRAMES + 2, height, width, arguments.width)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[random.integers(0, 3, (height, width))]
    ours = fastest(passl_step(features, labels), arguments.repeats)
    print(f"{arguments.grid} patches of width {arguments.width}, one thread: seconds a frame")
    print(f"passl     {ours:8.3f}")
    if importlib.util.find_spec("torch") is None:
        print("official  (PyTorch is not installed)")
        return
    theirs = fastest(torch_step(features, labels), arguments.repeats)
    print(f"official  {theirs:8.3f}  {theirs / ours:.2f} times as long")


if __name__ == "__main__":
    main()
