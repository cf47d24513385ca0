"""``passl-plan``: a configuration for your images, your machine and your time, with reasons."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from passl.cli.common import RUN_ERROR, import_paddle, new_parser, stop

_HELP = """\
Propose how to pre-train on a folder of images with DINO, in the time and memory there is: network, views, batch,
learning rate, teacher, prototypes, epochs, workers, evaluation; each with a reason. Short trials on your images
measure time and memory. The result is a configuration that runs.

  passl-plan photos/ --time 12h                             this machine: its GPUs, or else its CPU
  passl-plan photos/ --time 30m --cpu --out quick.yaml      this CPU, also where there are GPUs
  passl-train -c quick.yaml                                 ... and the run itself
  passl-plan photos/ --time 2d --arch vit_small --patch-size 8
  passl-plan photos/ --time 2d --gpus 8 --gpu-memory 32     GPUs elsewhere: memory is counted, time is not known
  passl-plan photos/ --time 2d --gpus 8 --gpu-memory 32 --images-per-second 2400

photos/ holds images in folders of any kind. If the folders are classes, k-NN measures the features while training;
the best is photos/train/<class>/ and photos/val/<class>/. A list (.csv with columns path and label, .txt) and a
tarball with its index (passl-data tar-index) do as well.
"""


def plan_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-plan``"""
    options = _parser().parse_args(arguments)
    from passl.engine.plan.budget import PlanError, parse_time

    try:
        seconds = parse_time(options.time)
        if options.images_per_second is not None and not 0 < options.images_per_second < 1e9:
            raise PlanError(f"--images-per-second {options.images_per_second:g} must be more than 0")
        if options.patch_size is not None and not 1 <= options.patch_size <= 224:
            raise PlanError(f"--patch-size {options.patch_size} must be from 1 to 224")
        _plan(options, seconds)
    except (PlanError, OSError) as error:
        stop(error, RUN_ERROR)


def _plan(options: argparse.Namespace, seconds: float) -> None:
    import_paddle()
    from passl.engine.plan import document
    from passl.engine.plan.job import Request
    from passl.engine.plan.machine import machine
    from passl.engine.plan.planner import make_plan

    request = Request(
        source=options.data,
        time=seconds,
        machine=machine(options.gpus, options.gpu_memory, options.cpu, options.memory),
        out=options.out,
        arch=options.arch,
        patch_size=options.patch_size,
        is_dense=options.objective == "dense",
        rate=options.images_per_second,
        seed=options.seed,
        force=options.force,
    )
    plan = make_plan(request, lambda line: print(line, file=sys.stderr, flush=True))
    width = min(max(shutil.get_terminal_size((120, 40)).columns, 80), 160)
    print("\n".join(["", *document.table(plan.settings, width), "", *plan.facts]))
    print(f"\nwritten: {', '.join(str(file) for file in plan.files)}")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("passl-plan", _HELP)
    add = parser.add_argument
    add("data", metavar="DATA", help="folder of images, list (.csv, .txt), or tarball or its folder")
    add("--time", required=True, metavar="TIME", help="how long the run may take: 90s, 45m, 12h, 1h30m, 2d")
    add("--gpus", type=int, metavar="N", help="how many GPUs (default: those of this machine)")
    add("--gpu-memory", type=float, metavar="GB", help="memory of each (default: as measured)")
    add("--cpu", action="store_true", help="train on this CPU (the default where there is no GPU)")
    add("--memory", type=float, metavar="GB", help="memory that the run may take on the CPU (default: what is free)")
    add("--arch", metavar="NAME", help="backbone: vit_small, resnet50 ... (default: by images and time)")
    add("--patch-size", type=int, metavar="P", help="of a vision transformer (default: by the size of the images)")
    add(
        "--objective", choices=("image", "dense"), default="image",
        help="image: features of whole images (default); dense: of places in them, by patches half as large",
    )  # fmt: skip
    add("--images-per-second", type=float, metavar="R", help="speed of the GPUs elsewhere, all together: ips in a log")
    add("--out", type=Path, default=Path("plan.yaml"), metavar="FILE", help="configuration to write (%(default)s)")
    add("--force", action="store_true", help="replace FILE and the lists beside it")
    add("--seed", type=int, default=0, help="of the run and of what is drawn for k-NN (%(default)s)")
    return parser
