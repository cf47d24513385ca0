"""``passl-visualize attention``"""

from __future__ import annotations

import argparse
from typing import Any

from passl.cli import subject


def add_to(commands: Any) -> None:
    parser = commands.add_parser("attention", help="what the [CLS] token attends to")
    subject.add_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from passl.engine.subject import load

    print(load(subject.config_of(options), "looking at"))
