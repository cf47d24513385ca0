"""``passl-predict``: classes and features of images, by a file from ``passl-export``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Optional, TextIO

from passl.cli.common import RUN_ERROR, image_size, new_parser, stop, whole_number

_HELP = """\
Classify images with one file from passl-export, or compute their features.

  passl-predict birds.passl holiday/                   a folder, with everything below it
  passl-predict birds.onnx 'holiday/**/*.jpg' --topk 1
  passl-predict birds.passl a.jpg b.png --output -     JSON lines: {"path": ..., "classes": [{"class": ...}, ...]}
  passl-predict birds.passl clip.mp4 --frame-step 25   one frame a second; needs pip install "passl[video]"
  passl-predict dino.passl holiday/ --features f.npy   features [N, D], and the name of each row in f.txt

Images are prepared as in validation: how is written in the file. An image that cannot be read is named and left out,
and the exit code is then 1. An .onnx runs without Paddle.
"""


def predict_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-predict``"""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message=".*ccache.*")
    from passl.exported import ExportError
    from passl.predict import SourceError

    try:
        failures = _predict(options)
    except (ExportError, SourceError, OSError) as error:
        stop(error, RUN_ERROR)
    if failures:
        sys.exit(RUN_ERROR)


def _predict(options: argparse.Namespace) -> int:
    """Returns the number of images that could not be read."""
    from tqdm import tqdm

    from passl import exported
    from passl.predict import FeatureFile, find_files, json_line, pictures, predict, table_line

    network = exported.ExportedNetwork(options.model, options.device)
    channels = network.meta.channels
    files = find_files(options.source, channels)
    names = network.meta.class_names
    if not names and options.features is None:
        raise exported.ExportError(
            f"{options.model} gives features, not classes: ask for them with --features FILE.npy, or export with a "
            "linear probe or --knn-bank"
        )
    preprocessing = network.meta.preprocessing
    if options.image_size is not None:
        preprocessing = exported.at_size(preprocessing, *options.image_size)
    widths = (min(max(map(len, files)) + 5, 60), min(max(map(len, names), default=0), 24))
    results = predict(
        network,
        pictures(files, options.frame_step, channels),
        exported.transform(preprocessing),
        options.batch_size,
        options.num_workers,
    )
    bad = []
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(_open(options.output)) if options.output else None
        features = stack.enter_context(FeatureFile(options.features)) if options.features else None
        for result in stack.enter_context(tqdm(results, unit="image", disable=None)):
            if result.error is not None:
                bad.append(f"  {result.name}: {result.error}")
            if features is not None:
                features.add(result)
            if lines is not None:
                print(json_line(result, names, options.topk), file=lines)
            elif names:
                tqdm.write(table_line(result, names, options.topk, widths))
    if features is not None:
        print(f"{features.path}: {features.count} x {features.dim}; names in {features.names_path}", file=sys.stderr)
    if bad:
        print("\n".join([f"{len(bad)} could not be read and are left out:", *bad]), file=sys.stderr)
    return len(bad)


def _open(path: str) -> contextlib.AbstractContextManager[TextIO]:
    # Line by line: what an interrupted run leaves is whole lines.
    return contextlib.nullcontext(sys.stdout) if path == "-" else open(path, "w", buffering=1, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("passl-predict", _HELP)
    add = parser.add_argument
    add("model", metavar="MODEL", help="file from passl-export, .passl or .onnx")
    add("source", nargs="+", metavar="SOURCE", help="images, videos, folders of them, patterns in quotes")
    add("--topk", type=whole_number(), default=5, help="classes to list (default %(default)s)")
    add("--output", metavar="FILE", help="write JSON lines in place of the table; - is standard output")
    add("--features", metavar="FILE.npy", help="write the features [N, D], and the name of each row to FILE.txt")
    add("--image-size", type=image_size, metavar="SIZE", help="224 or 480x640, for a file exported with dynamic")
    add("--frame-step", type=whole_number(), default=1, help="of a video, every so many frames (default %(default)s)")
    add("--batch-size", type=whole_number(), default=16, help="default %(default)s")
    add("--num-workers", type=whole_number(), default=2, help="threads that read images (default %(default)s)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: a GPU where there is one")
    return parser
