"""One DINO training step of passl beside the same step of PyTorch, on a CPU.

    python benchmarks/train_step.py --torch-python /path/to/python/with/torch

The step: ViT-S/16, 2 x 224 and 8 x 96 pixel views, 65536 prototypes, 4 images, float32: teacher forward, student
forward, loss, backward, clipping of each gradient to 3.0, AdamW, moving average of the teacher. The other side is
timm's ViT with lightly's head and loss where these are installed, else the same in plain PyTorch.

Each side runs in a process of its own interpreter. Both stay alive and take turns, so that they share the machine's
weather and never compute at the same time. Reported are medians, their ratio, and where the time goes. PyTorch has its
fastest AdamW, and both sides keep freed memory (passl.models.cpu), which saves PyTorch page faults too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

STUDENT_TEMP, TEACHER_TEMP, MOMENTUM, CLIP_NORM = 0.1, 0.04, 0.996, 3.0
LEARNING_RATE, WEIGHT_DECAY = 5e-5, 0.04
GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL = 224, 96, 8

Step = Callable[["Stopwatch"], float]  # does one step, returns the loss


class Stopwatch:
    """Adds up the seconds between laps, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now


def passl_step(batch_size: int, out_dim: int) -> tuple[str, Step]:
    """-> a description, the step"""
    import functools

    import paddle

    from passl.engine.optim import AdamW
    from passl.models import DINO, DINOHead, cpu, vit_small

    cpu.tune()  # as passl-train does
    paddle.seed(0)
    method = DINO(vit_small, functools.partial(DINOHead, out_dim=out_dim))
    method.train()
    optimizer = AdamW(method.param_groups(), clip_norm=CLIP_NORM)
    batch = {
        "global_crops": paddle.randn([2 * batch_size, 3, GLOBAL_SIZE, GLOBAL_SIZE]),
        "local_crops": paddle.randn([NUM_LOCAL * batch_size, 3, LOCAL_SIZE, LOCAL_SIZE]),
    }
    current = Stopwatch()
    for name, layer in (("teacher", method.teacher), ("student", method.student), ("loss", method.dino_loss)):
        layer.register_forward_post_hook(lambda *_, name=name: current.lap(name))

    def step(watch: Stopwatch) -> float:
        nonlocal current
        current = watch
        loss = method(batch, teacher_temp=TEACHER_TEMP)["loss"]
        loss.backward()
        watch.lap("backward")
        optimizer.clip_gradients()
        watch.lap("clip")
        optimizer.set(LEARNING_RATE, WEIGHT_DECAY)
        optimizer.step()
        optimizer.clear_grad()
        watch.lap("optimizer")
        method.after_step(teacher_momentum=MOMENTUM)
        watch.lap("moving average")
        return loss.item()

    return f"passl on Paddle {paddle.__version__}", step


def torch_step(batch_size: int, out_dim: int) -> tuple[str, Step]:
    """-> a description, the step"""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        parts, student, teacher, dino_loss = timm_and_lightly(out_dim)
    except (ImportError, RuntimeError):  # a torchvision of another build raises the latter
        parts, student, teacher, dino_loss = plain_torch(out_dim)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    crops = [torch.randn(2 * batch_size, 3, GLOBAL_SIZE, GLOBAL_SIZE)]
    crops.append(torch.randn(NUM_LOCAL * batch_size, 3, LOCAL_SIZE, LOCAL_SIZE))

    def step(watch: Stopwatch) -> float:
        with torch.no_grad():
            teacher_logits = teacher[1](teacher[0](crops[0]))
        watch.lap("teacher")
        student_logits = student[1](torch.cat([student[0](crop) for crop in crops]))
        watch.lap("student")
        loss = dino_loss(teacher_logits.chunk(2), student_logits.chunk(2 + NUM_LOCAL))
        watch.lap("loss")
        loss.backward()
        watch.lap("backward")
        for parameter in trained:
            factor = CLIP_NORM / (parameter.grad.norm() + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
        watch.lap("clip")
        optimizer.step()
        optimizer.zero_grad()
        watch.lap("optimizer")
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters()):
                ours.mul_(MOMENTUM).add_(theirs, alpha=1.0 - MOMENTUM)
        watch.lap("moving average")
        return loss.item()

    return f"{parts} on PyTorch {torch.__version__}", step


def timm_and_lightly(out_dim: int) -> tuple:
    """-> description, student, teacher (backbone and head each), loss of (teacher views, student views)"""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):  # without them, a torchvision built for GPUs cannot be imported beside CPU PyTorch
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import lightly
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    def network() -> torch.nn.ModuleList:
        backbone = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
        return torch.nn.ModuleList([backbone, DINOProjectionHead(384, 2048, 256, out_dim)])

    loss = DINOLoss(out_dim, student_temp=STUDENT_TEMP)
    description = f"timm {timm.__version__} and lightly {lightly.__version__}"
    return description, network(), network(), lambda t, s: loss(list(t), list(s), teacher_temp=TEACHER_TEMP)


def plain_torch(out_dim: int) -> tuple:
    """As `timm_and_lightly`, with nothing but PyTorch."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, 384, 16, 16)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 384))
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 384, 14, 14))
            block = nn.TransformerEncoderLayer(384, 6, 1536, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(block, 12, nn.LayerNorm(384, 1e-6), enable_nested_tensor=False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.proj(images)
            x = x + F.interpolate(self.pos_embed, size=x.shape[-2:], mode="bicubic")
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
            return self.blocks(x)[:, 0]

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(384, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)]
            self.mlp = nn.Sequential(*layers)
            self.last_layer = nn.utils.weight_norm(nn.Linear(256, out_dim, bias=False))
            self.last_layer.weight_g.data.fill_(1.0)
            self.last_layer.weight_g.requires_grad = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last_layer(F.normalize(self.mlp(x), dim=-1))

    center = torch.zeros(1, out_dim)

    def loss(teacher_views: tuple, student_views: tuple) -> torch.Tensor:
        targets = [F.softmax((view - center) / TEACHER_TEMP, dim=-1) for view in teacher_views]
        logs = [F.log_softmax(view / STUDENT_TEMP, dim=-1) for view in student_views]
        terms = [-(t * s).sum(-1).mean() for i, t in enumerate(targets) for j, s in enumerate(logs) if i != j]
        center.mul_(0.9).add_(torch.cat(teacher_views).mean(0, keepdim=True), alpha=0.1)
        return sum(terms) / len(terms)

    student, teacher = (nn.ModuleList([Backbone(), Head()]) for _ in range(2))
    return "plain PyTorch", student, teacher, loss


SIDES = {"passl": passl_step, "torch": torch_step}


def work(side: str, batch_size: int, out_dim: int) -> None:
    """A side's process: one step for each line of stdin, one JSON answer for each on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers
    try:
        description, step = SIDES[side](batch_size, out_dim)
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=answers)
        return
    print(json.dumps({"description": description}), file=answers)
    for _ in sys.stdin:
        watch = Stopwatch()
        start = time.perf_counter()
        loss = step(watch)
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss, "parts": watch.parts}), file=answers)


class Worker:
    """The parent's end of a side's process."""

    def __init__(self, side: str, python: str, arguments: argparse.Namespace) -> None:
        threads = str(arguments.threads)
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": root}
        environment.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))
        options = ["--side", side, "--batch-size", str(arguments.batch_size), "--out-dim", str(arguments.out_dim)]
        self.process = subprocess.Popen(
            [python, "-W", "ignore", __file__, *options],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not arguments.verbose else None,
            text=True,
        )
        self.times: list[dict] = []

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"the process ended with code {self.process.wait()}; see it with --verbose"}
        return json.loads(line)

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def report(workers: dict[str, Worker]) -> str:
    """The table: median seconds of the whole step and of its parts, and passl / PyTorch."""
    medians: dict[str, list[float]] = {"whole step": []}
    for worker in workers.values():
        medians["whole step"].append(statistics.median(answer["seconds"] for answer in worker.times))
    for part in workers["passl"].times[0]["parts"]:
        medians[part] = [statistics.median(a["parts"].get(part, math.nan) for a in w.times) for w in workers.values()]
    lines = [f"{'milliseconds':<16}{'passl':>8}{'torch':>8}{'ratio':>8}"]
    for name, (ours, theirs) in medians.items():
        lines.append(f"{name:<16}{1e3 * ours:>8.0f}{1e3 * theirs:>8.0f}{ours / theirs:>8.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch (default: this one)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each side (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before that (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default: 2)")
    parser.add_argument("--batch-size", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--out-dim", type=int, default=65536, help="prototypes (default: 65536)")
    parser.add_argument("--verbose", action="store_true", help="show what the two processes write to stderr")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        work(arguments.side, arguments.batch_size, arguments.out_dim)
        return 0

    workers = {}
    try:
        for side, python in (("passl", sys.executable), ("torch", arguments.torch_python)):
            workers[side] = Worker(side, python, arguments)
            started = workers[side].answer()
            if "error" in started:
                print(f"{side} cannot run with {python}: {started['error']}. See --torch-python.", file=sys.stderr)
                return 1
            print(f"{side}: {started['description']}, {arguments.threads} threads")
        for index in range(arguments.warmup + arguments.steps):
            for side, worker in workers.items():
                answer = worker.step()
                if "error" in answer:
                    print(f"{side} failed: {answer['error']}", file=sys.stderr)
                    return 1
                if index >= arguments.warmup:
                    worker.times.append(answer)
        print(report(workers))
    finally:
        for worker in workers.values():
            worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
