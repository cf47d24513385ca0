"""Peak memory and time of forward and backward with and without recomputed blocks (DistributedStrategy.recompute).

    python benchmarks/recompute.py

ViT-S/16 on random images of 224 pixels, on the CPU. Each measurement has a process of its own, one after the other:
the largest resident memory (ru_maxrss, with the 0.3 GB of Paddle itself) and the CPU seconds of the fastest of the
steps, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measure(batch_size: int, steps: int, recompute: bool) -> tuple[float, float]:
    """Peak memory in GB and CPU seconds of the fastest step."""
    import paddle

    from passl.engine.recompute import recompute_blocks
    from passl.models import LinearProbe, cpu, vit_small

    paddle.set_device("cpu")
    cpu.tune()
    method = LinearProbe(vit_small, num_classes=10)
    for parameter in method.backbone.parameters():
        parameter.stop_gradient = False
    if recompute:
        recompute_blocks(method, True)
    method.backbone.train()
    images = paddle.rand([batch_size, 3, 224, 224])
    seconds = []
    for _ in range(steps):
        started = time.process_time()
        method.backbone(images).square().mean().backward()
        method.clear_gradients()
        seconds.append(time.process_time() - started)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", choices=("whole", "recomputed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measure(options.batch_size, options.steps, options.one == "recomputed"))
        return
    results = {}
    for name in ("whole", "recomputed"):
        command = [sys.executable, __file__, "--one", name]
        command += ["--batch-size", str(options.batch_size), "--steps", str(options.steps)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[name] = [float(word) for word in shown.split()[-2:]]
        print(f"{name:12} {results[name][0]:6.2f} GB {results[name][1]:8.2f} s", flush=True)
    memory, seconds = (results["recomputed"][column] / results["whole"][column] for column in range(2))
    print(f"{'ratio':12} {memory:6.2f}    {seconds:8.2f}")


if __name__ == "__main__":
    main()
