"""``passl-data stats``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from passl.cli.common import whole_number

if TYPE_CHECKING:
    from passl.data.samples import ImageSamples
    from passl.data.statistics import BadImages, ChannelStatistics

_DESCRIPTION = """\
Mean and standard deviation of each channel over all pixels, in the units of training: 8-bit values / 255, 16-bit
values / 65535, floats as they are. Unreadable images are named and left out.

  passl-data stats slides/ --out configs/slides_stats.yaml
  passl-data stats train.csv --channels 4 --limit 5000 --num-workers 8

The file is a section Data, for the line `_base_: slides_stats.yaml` of a configuration.
"""
_MAX_BAD_SHOWN = 20


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "stats",
        help="mean and standard deviation of the channels of a data set",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE", help="folder of images, list (.csv, .txt), tarball, or its folder")
    add("--channels", type=_channels, metavar="N", help="channels of every image, or auto (default): as most have")
    add("--limit", type=whole_number(), metavar="N", help="measure so many images, drawn at random (default: all)")
    add("--seed", type=int, default=0, help="of --limit (default %(default)s)")
    add("--num-workers", type=int, default=0, metavar="N", help="processes (default %(default)s: this one)")
    add("--out", type=Path, metavar="FILE", help="YAML file to write (default: print it)")
    parser.set_defaults(run=_run)


def _channels(text: str) -> Optional[int]:
    return None if text == "auto" else whole_number()(text)


def _run(options: argparse.Namespace) -> None:
    import numpy as np

    from passl.data.statistics import Concatenated, usual_channels

    if options.seed < 0 or options.num_workers < 0:
        raise ValueError("--seed and --num-workers must be at least 0")
    if options.out is not None and options.out.is_dir():
        raise ValueError(f"--out {options.out}: a folder is there; name a file such as {options.out / 'stats.yaml'}")
    images = Concatenated([_open(source) for source in options.source])
    images.channels = options.channels or usual_channels(images)
    count = min(options.limit or len(images), len(images))
    indices = np.sort(np.random.default_rng(options.seed).choice(len(images), count, replace=False))
    found, bad = _measured(images, indices, options.num_workers)
    if bad:
        more = [f"  and {len(bad) - _MAX_BAD_SHOWN} more"] if len(bad) > _MAX_BAD_SHOWN else []
        lines = [f"  {name}: {reason}" for name, reason in bad[:_MAX_BAD_SHOWN]]
        print("\n".join([f"{len(bad)} could not be read and are left out:", *lines, *more]), file=sys.stderr)
    if not found.num_images:
        raise ValueError(f"none of the {count} images can be read")
    facts = _facts(options, found, len(bad), len(images))
    print("\n".join([*facts, *_table(found)]))
    section = _section(facts, found)
    if options.out is None:
        print(f"\n{section}", end="")
        return
    from passl.formats.atomic import replacing

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as file:
        file.write(section.encode())
    print(f"written to {options.out}: give it to a configuration as _base_")


def _open(source: str) -> ImageSamples:
    import passl.data  # noqa: F401  (fills the registry)
    from passl.data.sources import dataset_of
    from passl.registry import DATASETS

    spec = dataset_of(source)
    if "root" in spec and spec["name"] == "ImageList":
        spec["channels"] = 1  # with channels .npy files are images; how many they are is told later
    return DATASETS.get(spec.pop("name"))(**spec)


def _measured(images: Any, indices: Any, num_workers: int) -> tuple[ChannelStatistics, BadImages]:
    from tqdm import tqdm

    from passl.data.statistics import ChannelStatistics, measure

    total, bad = ChannelStatistics(), []
    with tqdm(total=len(indices), unit="image", disable=None) as bar:
        for done, total, new in measure(images, indices, num_workers):  # noqa: B007 (the last total is the result)
            bad += new
            bar.update(done - bar.n)
    return total, bad


def _facts(options: argparse.Namespace, found: ChannelStatistics, num_bad: int, length: int) -> list[str]:
    """What was measured, line by line."""
    drawn = "" if found.num_images + num_bad == length else f", drawn from {length} with seed {options.seed}"
    left_out = f", {num_bad} unreadable left out" if num_bad else ""
    (low_height, low_width), (high_height, high_width) = found.smallest, found.largest
    types = ", ".join(f"{dtype} {count}" for dtype, count in sorted(found.dtypes.items()))
    return [
        f"{', '.join(options.source)}: {found.num_images} images{drawn}{left_out}",
        f"heights {low_height} to {high_height}, widths {low_width} to {high_width}, types: {types}",
    ]


def _table(found: ChannelStatistics) -> list[str]:
    columns = (found.mean, found.std, found.lowest, found.highest)
    lines = [f"{'channel':>7} {'mean':>12} {'std':>12} {'lowest':>12} {'highest':>12}"]
    for channel, values in enumerate(zip(*columns)):
        lines.append(" ".join([f"{channel:7d}", *(f"{value:12.6g}" for value in values)]))
    return lines


def _section(facts: list[str], found: ChannelStatistics) -> str:
    from passl.config import to_yaml

    std = found.std.tolist()
    constant = [channel for channel, value in enumerate(std) if value == 0.0]
    comments = list(facts)
    if constant:
        comments.append(f"constant, so their std is set to 1: channel {', '.join(map(str, constant))}")
        print(f"warning: {comments[-1]}", file=sys.stderr)
    section = {
        "channels": len(std),
        "mean": found.mean.tolist(),
        "std": [value or 1.0 for value in std],
    }
    # Names of files may hold anything, also ends of lines.
    header = "".join(f"# {' '.join(line.split())}\n" for line in ["passl-data stats", *comments])
    return header + to_yaml({"Data": section})
