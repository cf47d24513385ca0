"""Forward and backward over the crops of DINO: each by itself, by size, and packed; and stochastic depth on subsets.

    python benchmarks/crops.py

2 global and 8 local crops of each image, on a CPU, one thread, float32; stochastic depth with the global crops of 2.5
times as many. The ways take turns in one process; reported are medians of the CPU seconds, which other work on the
machine changes little, their ratio to the first line of each table, and how many matrix products the forward is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# (arguments of VisionTransformer, side of global crops, side of local crops)
MODELS = {
    "small": ((224, 16, 3, 384, 12, 6), 224, 96),  # ViT-S/16
    "demo": ((48, 8, 3, 96, 2, 3), 48, 24),  # of configs/demo/pretrain.yaml
}
NUM_LOCAL = 8
Ways = dict[str, tuple[Any, Callable]]  # a model, and what gives the features or tokens that a loss takes


def ways_of_crops(arguments: tuple, sizes: tuple[int, int], batch_size: int) -> Ways:
    import paddle

    from passl.models import VisionTransformer

    model = VisionTransformer(*arguments)
    counts = (2, NUM_LOCAL)
    crops = [paddle.randn([n * batch_size, 3, size, size]) for n, size in zip(counts, sizes)]
    views = [view for batch, n in zip(crops, counts) for view in batch.chunk(n)]
    ways = {
        "[CLS], each view by itself": lambda: [model(view) for view in views],
        "[CLS], by size": lambda: [model(batch) for batch in crops],
        "[CLS], by size, alone in the last block": lambda: [model.cls_of_crops(crops, packed=False)],
        "[CLS], packed, alone in the last block": lambda: [model.cls_of_crops(crops, packed=True)],
        "all tokens, each view by itself": lambda: [model.forward_crops([view])[0] for view in views],
        "all tokens, by size": lambda: model.forward_crops(crops, packed=False),
        "all tokens, packed": lambda: model.forward_crops(crops, packed=True),
    }
    return {name: (model, way) for name, way in ways.items()}


def ways_of_drop_path(arguments: tuple, sizes: tuple[int, int], batch_size: int) -> Ways:
    import paddle

    from passl.models import VisionTransformer

    crops = [paddle.randn([5 * batch_size, 3, sizes[0], sizes[0]])]
    options = {"no stochastic depth": {}}
    for rate in (0.3, 0.4):
        options[f"rate {rate}, samples multiplied by 0"] = {"drop_path_rate": rate}
        options[f"rate {rate}, on subsets"] = {"drop_path_rate": rate, "drop_path_subset": True}
    models = {name: VisionTransformer(*arguments, drop_path_uniform=True, **values) for name, values in options.items()}
    return {name: (model, lambda model=model: model.forward_crops(crops)) for name, model in models.items()}


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """Counts the matrix products in a forward."""
    import paddle

    count, originals = [0], {name: getattr(paddle, name) for name in ("matmul", "addmm")}

    def counting(original: Callable) -> Callable:
        def product(*inputs: object, **options: object) -> object:
            count[0] += 1
            return original(*inputs, **options)

        return product

    for name, original in originals.items():
        setattr(paddle, name, counting(original))
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(paddle, name, original)


def measure(ways: Ways, repeats: int) -> dict[str, tuple[int, float]]:
    """Of each way the matrix products and the median seconds."""
    products, seconds = {}, {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, (model, way) in ways.items():
            started = time.process_time()
            with counted_products() as count:
                outputs = way()
            sum(x.square().sum() for x in outputs).backward()
            seconds[name].append(time.process_time() - started)
            products[name] = count[0]
            model.clear_gradients()
    return {name: (products[name], statistics.median(seconds[name][1:])) for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-size", type=int, help="images (default: 2 for small, 16 for demo)")
    parser.add_argument("--repeats", type=int, default=5, help="measured passes of each way (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    import paddle

    from passl.models import cpu

    paddle.set_device("cpu")
    cpu.tune()
    paddle.seed(0)
    for name in options.models:
        arguments, *sizes = MODELS[name]
        batch_size = options.batch_size or {"small": 2, "demo": 16}[name]
        for ways in (ways_of_crops, ways_of_drop_path):
            results = measure(ways(arguments, sizes, batch_size), options.repeats)
            print(f"{name}, {batch_size} images, medians of {options.repeats}: products, ms, ratio")
            first = next(iter(results.values()))[1]
            for way, (products, seconds) in results.items():
                print(f"  {way:<42}{products:>6}{1e3 * seconds:>9.1f}{seconds / first:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
