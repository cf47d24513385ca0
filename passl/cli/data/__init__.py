"""``passl-data``: make and check data sets. Each command is a module with ``add_to(commands)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from passl.cli.common import RUN_ERROR, new_parser, stop
from passl.cli.data import demo, public, stats, tar

_HELP = """\
Make, fetch, pack, check and measure data sets.

  passl-data demo --out demo_data                                             ten classes of drawn shapes
  passl-data cifar10                                                          dataset/cifar10/{train,test}/<class>/
  passl-data tar-index --tarball_path data/pretrain_dataset.tar --output_root data
  passl-data tar-check data/pretrain_dataset.tar                              corrupt and duplicate images
  passl-data stats slides/ --out stats.yaml                                   mean and deviation of any channels

docs/data.md explains them; COMMAND --help has more.
"""
_COMMANDS = (demo, public, stats, tar)


def data_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-data``"""
    parser = new_parser("passl-data", _HELP)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        stop(error, RUN_ERROR)
