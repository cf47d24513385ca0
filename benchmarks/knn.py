"""Weighted k-NN on features: passl on a CPU, and the official classifier's mathematics on PyTorch.

    python benchmarks/knn.py
    python benchmarks/knn.py --threads 1 --sets cifar10 imagenet --repeats 9

Both sides get the same unit rows and labels in memory and give top-1 and top-5 for k = 10, 20, 100, 200. The official
side classifies for each k anew, as the official script does, in chunks of as many rows as it has there (a hundredth of
all test images: 100 of CIFAR's, 500 of ImageNet's); and, as a harder rival, with one search for all k. The sides take
turns, and the medians of the passes are shown: milliseconds for a test image (with one thread of processor time, which
other programs disturb less), and PyTorch's as a multiple of passl's: above 1 passl is faster. The largest difference of
a rate, in percent, must be that of a few images whose votes differ by rounding only.

Needs PyTorch in the same environment; without it only passl is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# name: training rows, test rows, width, classes
SETS = {
    "cifar10": (50_000, 1_000, 384, 10),
    "cifar100": (50_000, 1_000, 384, 100),
    "imagenet": (200_000, 500, 384, 1000),  # a part of the images
    "base": (40_000, 500, 768, 1000),
    "last4": (40_000, 500, 1536, 1000),  # [CLS] of four blocks
    "resnet50": (40_000, 500, 2048, 1000),
    "small": (5_000, 1_000, 384, 10),
}
Rates = dict[str, float]


def make_set(shape: tuple[int, int, int, int]) -> tuple[Any, Any, Any, Any]:
    """Unit rows around a centre for each class, and labels."""
    import numpy as np

    train_rows, test_rows, width, classes = shape
    random = np.random.default_rng(0)
    centers = random.standard_normal((classes, width), np.float32)
    parts = []
    for count in (train_rows, test_rows):
        # Class after class, as class folders are read.
        labels = np.sort(random.integers(0, classes, count))
        rows = 0.2 * centers[labels] + random.standard_normal((count, width), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        parts += [rows, labels]
    return tuple(parts)


def passl_side(data: tuple[Any, Any, Any, Any]) -> Callable[[], Rates]:
    from passl.evaluators.classification import count_hits
    from passl.evaluators.knn import knn_votes

    train, train_labels, test, labels = data

    def rates() -> Rates:
        hits = {f"top{top}_k{k}": 0 for k in KS for top in (1, 5)}
        for k, start, votes in knn_votes(train, train_labels, test, KS, TEMPERATURE):
            for top in (1, 5):
                hits[f"top{top}_k{k}"] += count_hits(votes, labels[start : start + len(votes)], top)
        return {name: 100 * count / len(test) for name, count in hits.items()}

    return rates


def torch_side(data: tuple[Any, Any, Any, Any], threads: int, once: bool) -> Callable[[], Rates]:
    """once: one search for all k. Raises ImportError: no PyTorch."""
    import torch

    torch.set_num_threads(threads)
    train, train_labels, test, labels = map(torch.from_numpy, data)
    bank, classes = train.t(), int(train_labels.max()) + 1
    chunk = 500 if classes == 1000 else 100

    def hits_of(similarity: Any, neighbours: Any, wanted: Any, hits: Rates, k: int) -> None:
        voters = train_labels[neighbours]
        one_hot = torch.zeros(len(wanted) * k, classes).scatter_(1, voters.view(-1, 1), 1)
        weights = (similarity / TEMPERATURE).exp()
        votes = torch.sum(one_hot.view(len(wanted), k, classes) * weights.view(len(wanted), k, 1), 1)
        right = votes.sort(1, descending=True)[1].eq(wanted.view(-1, 1))
        for top in (1, 5):
            hits[f"top{top}_k{k}"] += right[:, :top].sum().item()

    @torch.no_grad()
    def rates() -> Rates:
        hits = {f"top{top}_k{k}": 0 for k in KS for top in (1, 5)}
        for ks in [KS] if once else [(k,) for k in KS]:
            for start in range(0, len(test), chunk):
                products = torch.mm(test[start : start + chunk], bank)
                similarity, neighbours = products.topk(max(ks), largest=True, sorted=True)
                for k in ks:
                    hits_of(similarity[:, :k], neighbours[:, :k], labels[start : start + chunk], hits, k)
        return {name: 100 * count / len(test) for name, count in hits.items()}

    return rates


def measure(name: str, threads: int, repeats: int) -> str:
    """A row of the table."""
    data = make_set(SETS[name])
    sides = {"passl": passl_side(data)}
    try:
        sides["torch"] = torch_side(data, threads, once=False)
        sides["once"] = torch_side(data, threads, once=True)
    except ModuleNotFoundError:
        pass
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, Rates] = {}
    for _ in range(repeats):
        for side, rates in sides.items():
            start = clock()
            found[side] = rates()
            seconds[side].append(clock() - start)
    train_rows, test_rows, width, classes = SETS[name]
    medians = {side: 1000 * statistics.median(values) / test_rows for side, values in seconds.items()}
    row = f"{name:<10}{train_rows:>9}{width:>7}{classes:>9}{medians['passl']:>10.3f}"
    if "torch" in sides:
        row += "".join(f"{medians[side]:>10.3f}{medians[side] / medians['passl']:>7.2f}" for side in ("torch", "once"))
        apart = max(abs(found["passl"][key] - found["torch"][key]) for key in found["passl"])
        row += f"{apart:>9.2f}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each side (default: 5)")
    parser.add_argument("--rows", type=int, help="training rows of every set, to try this out")
    options = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if options.rows:
        SETS.update({name: (options.rows, min(20, shape[1]), *shape[2:]) for name, shape in SETS.items()})
    print(f"{options.threads} threads, {options.repeats} passes of each side; ms for a test image", flush=True)
    columns = (("", 10), ("train", 9), ("width", 7), ("classes", 9), ("passl", 10), ("torch", 10), ("ratio", 7))
    columns += (("one mm", 10), ("ratio", 7), ("apart, %", 9))
    print("".join(f"{name:>{width}}" for name, width in columns), flush=True)
    for name in options.sets:
        print(measure(name, options.threads, options.repeats), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
