"""``passl-doctor``: what is wrong with a run, and what to change."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from passl.cli.common import RUN_ERROR, new_parser, stop

NOT_HEALTHY = 3
_HELP = """\
Say what is wrong with a pre-training run, and which setting to change, from what the run wrote.

  passl-doctor output/DINO                  the folder of a run: metrics.jsonl and config.yaml
  passl-doctor log.txt --out-dim 65536      the log of the official PyTorch code
  passl-doctor train.log                    lines [Train][Epoch 1/100][Iter: 0/1251] ... loss: 9.1

The verdict is one of: healthy, uniform collapse, one-hot collapse, not learning, unstable, data-bound. It is printed
with its evidence; the curves are written as doctor.png, and with the verdict as one page, doctor.html. Numbers and
rules: docs/doctor.md.

Exit codes: 0 a verdict was found, whichever; 3 with --exit-code, if it is not healthy; 1 the run cannot be read;
2 wrong arguments.
"""


def doctor_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-doctor``"""
    parser = new_parser("passl-doctor", _HELP)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, metrics.jsonl, log.txt or train.log")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for doctor.png and doctor.html (default: that of the run)"
    )
    parser.add_argument("--no-curves", action="store_true", help="only print the verdict, write nothing")
    parser.add_argument(
        "--out-dim", type=_out_dim, metavar="K", help="number of prototypes, where the file does not tell (log.txt)"
    )
    parser.add_argument("--exit-code", action="store_true", help=f"exit with {NOT_HEALTHY} unless the run is healthy")
    _diagnose(parser.parse_args(arguments))


def _out_dim(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 2")
    return int(text)


def _diagnose(options: argparse.Namespace) -> None:
    from passl.doctor.finding import HEALTHY
    from passl.doctor.reading import UnreadableRunError, read_run
    from passl.doctor.verdict import diagnose

    try:
        run = read_run(options.run.expanduser(), options.out_dim)
    except UnreadableRunError as error:
        stop(error, RUN_ERROR)
    if run.left_out:
        lines = ", ".join(map(str, run.left_out[:5])) + (", ..." if len(run.left_out) > 5 else "")
        print(f"warning: {options.run}: left out, as no JSON object: line {lines}", file=sys.stderr)
    finding = diagnose(run)
    print(f"{options.run}: {finding.text()}")
    if not options.no_curves:
        _write_curves(options, run, finding)
    if options.exit_code and finding.verdict != HEALTHY:
        sys.exit(NOT_HEALTHY)


def _write_curves(options: argparse.Namespace, run: object, finding: object) -> None:
    from passl.doctor.report import write_report

    path = options.run.expanduser()
    folder = options.out or (path if path.is_dir() else path.parent)
    try:
        picture, page = write_report(run, finding, str(options.run), folder)
    except OSError as error:
        # Where a run lies may be read-only, and the verdict is there already; a folder that was asked for is another
        # matter.
        if options.out is not None:
            stop(OSError(f"--out {folder}: curves not written ({error.strerror or error})"), RUN_ERROR)
        print(f"curves not written ({error}): give --out DIR", file=sys.stderr)
        return
    print(f"curves: {picture}, {page}")
