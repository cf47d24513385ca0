"""``passl-data demo``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="draw the demo data set: ten classes of shapes on clutter",
        description="Draw the demo data set: ten classes of shapes. Colour, pose, size, texture and clutter say "
        "nothing about the class.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make; gets {train,val}/<class>/<number>.png")
    add("--train-per-class", type=int, default=500, help="training images of each class")
    add("--val-per-class", type=int, default=100, help="validation images of each class")
    add("--size", type=int, default=48, help="side of the images in pixels")
    add("--seed", type=int, default=0, help="another seed draws other images")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from passl.data.demo import make_demo

    with tqdm(unit="image", disable=None) as bar:

        def show(drawn: int, total: int) -> None:
            bar.total = total
            bar.update(drawn - bar.n)

        drawn = make_demo(
            options.out, options.train_per_class, options.val_per_class, options.size, options.seed, progress=show
        )
    print(f"{options.out}: {drawn} images drawn" if drawn else f"{options.out}: complete already")
