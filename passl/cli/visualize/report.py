"""``passl-visualize report``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from passl.cli.common import RUN_ERROR, stop

_DESCRIPTION = """\
One page about runs of passl-train and passl-eval: their numbers beside each other, curves, the doctor's verdict,
timings, configurations, and what --report drew of each (attention, a map of features). The page needs nothing else.

  passl-visualize report output/DINO output/LinearProbe --out report.html

A run writes its own with `passl-train --report`, or `Global.report: true`.
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="one page about finished runs",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    add("--title", help="default: the names of the folders")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from passl.engine.report import ReportError, write_report

    try:
        print(write_report([run.expanduser() for run in options.runs], options.out.expanduser(), options.title))
    except ReportError as error:
        stop(error, RUN_ERROR)
