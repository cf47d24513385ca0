"""What the doctor costs a DINO training step, on a CPU.

    python benchmarks/doctor.py

ViT-S/16, 2 x 224 and 8 x 96 pixel views, 65536 prototypes, float32. Plain steps and steps with a visit take turns in
one process; neighbours differ by the price of a visit, which a run pays once in `Global.diagnose_every` steps. What is
counted is the processor's time on one thread, so that nothing else on the machine is.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

GLOBAL_SIZE, LOCAL_SIZE = 224, 96


def build(arguments: argparse.Namespace, folder: Path) -> tuple:
    """-> a trainer without data, its hook of the doctor, a batch"""
    import numpy as np
    import paddle

    from passl.engine.diagnosis import DiagnosisHook
    from passl.engine.hooks import LogHook
    from passl.engine.optim import AdamW
    from passl.engine.trainer import Trainer
    from passl.models import DINO, DINOHead, VisionTransformer, cpu, vit_small
    from passl.schedules import Timeline, constant

    cpu.tune()
    paddle.seed(0)
    tiny = functools.partial(VisionTransformer, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    head = functools.partial(DINOHead, out_dim=arguments.out_dim)
    method = (
        DINO(tiny, functools.partial(head, hidden_dim=64, bottleneck_dim=32))
        if arguments.tiny
        else DINO(vit_small, head)
    )
    rng = np.random.default_rng(0)
    size = arguments.batch_size
    sides = (32, 16) if arguments.tiny else (GLOBAL_SIZE, LOCAL_SIZE)
    batch = {
        name: rng.standard_normal((views * size, 3, side, side), np.float32)
        for name, views, side in (("global_crops", 2, sides[0]), ("local_crops", arguments.local_views, sides[1]))
    }
    batch["index"] = np.arange(size)
    line = Timeline(10**6, 10**6, size)
    values = {"lr": 5e-5, "weight_decay": 0.04, "teacher_temp": 0.04, "teacher_momentum": 0.996}
    schedules = {name: constant(line, value) for name, value in values.items()}
    images = SimpleNamespace(pool=None, __len__=None)
    loader = SimpleNamespace(dataset=images, num_workers=0)
    trainer = Trainer(method, AdamW(method.param_groups(), clip_norm=3.0), loader, schedules, line)
    hook = DiagnosisHook(LogHook(folder), 2, "{}")
    hook.distinct_images = 1.0  # compared once in a run, not at each visit
    method.train()
    hook.before_train(trainer)
    return trainer, hook, batch


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        trainer, hook, batch = build(arguments, Path(folder))
        seconds: dict[str, list[float]] = {"plain": [], "visited": []}
        for number in range(2 * (arguments.warmup + arguments.pairs)):
            kind = "visited" if hook.is_due else "plain"
            batch = {name: np.roll(values, 1) for name, values in batch.items()}  # new pixels
            start = time.process_time()
            trainer.train_step(batch)
            trainer.reader_seconds, trainer.batch_seconds = 0.0, time.process_time() - start
            hook.after_step(trainer)
            if number >= 2 * arguments.warmup:
                seconds[kind].append(time.process_time() - start)
        return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="measured steps of each kind (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="of each kind before that (default: 2)")
    parser.add_argument("--batch-size", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--local-views", type=int, default=8, help="(default: 8)")
    parser.add_argument("--out-dim", type=int, default=65536, help="prototypes (default: 65536)")
    parser.add_argument("--interval", type=int, default=25, help="Global.diagnose_every (default: its default, 25)")
    parser.add_argument("--tiny", action="store_true", help="a ViT of two blocks and 32-pixel views: the worst case")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds = measure(arguments)
    plain, visited = (statistics.median(seconds[kind]) for kind in ("plain", "visited"))
    # In each pair the two steps are neighbours.
    price = statistics.median(b - a for a, b in zip(seconds["plain"], seconds["visited"]))
    print(f"plain step {1e3 * plain:.1f} ms, with a visit {1e3 * visited:.1f} ms, a visit {1e3 * price:.1f} ms")
    print(f"one visit in {arguments.interval} steps: {price / plain / arguments.interval:.3%} of the training time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
