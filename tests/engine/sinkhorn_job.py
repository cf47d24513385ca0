"""What `test_centering.py` starts on two processes: Sinkhorn-Knopp of unequal shares of the rows, centres likewise.

Each process writes what it got to `FOLDER/RANK.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle

from passl import distributed
from passl.models.centering import CenteredLoss, sinkhorn_knopp

# Rows of both processes; the logits are multiplied by the number, so that the last ones overflow exponentials.
CASES = {"equal": ([0, 2, 4, 6], [1, 3, 5, 7], 1.0), "one row": ([7], list(range(7)), 1.0)}
CASES |= {"no row": ([], list(range(8)), 1.0), "no row of extreme logits": (list(range(8)), [], 1e4)}
CASES |= {"few rows of extreme logits": ([0, 1], list(range(2, 8)), 1e4)}
TEMPERATURE = 0.07


def logits(factor: float) -> np.ndarray:
    return factor * np.random.default_rng(0).standard_normal((8, 11)).astype(np.float32)


def center_after(rows: np.ndarray) -> np.ndarray:
    """The centre after one step with these rows of logits, in two micro-batches."""
    loss = CenteredLoss(rows.shape[1], 0.1, 0.9, "softmax")
    for part in np.array_split(rows, 2) if len(rows) > 1 else [rows]:
        counted = len(part) > 0
        loss.targets(paddle.to_tensor(part) if counted else paddle.zeros([1, rows.shape[1]]), TEMPERATURE, counted)
    loss.update_center()
    return loss.center.numpy()


def main() -> None:
    paddle.set_device("cpu")
    distributed.init()
    rank = distributed.rank()
    found = {}
    for name, (*shares, factor) in CASES.items():
        rows = logits(factor)[shares[rank]]
        found[name] = sinkhorn_knopp(paddle.to_tensor(rows), TEMPERATURE).numpy()
        found[f"{name}/center"] = center_after(rows)
    np.savez(Path(sys.argv[1]) / f"{rank}.npz", **found)


if __name__ == "__main__":
    main()
