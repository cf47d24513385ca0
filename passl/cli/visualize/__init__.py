"""``passl-visualize``: pictures of what a network sees. Each command is a module with ``add_to(commands)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from passl.cli.common import guarded, import_paddle, new_parser
from passl.cli.visualize import attention, embeddings, pca, report, video

_HELP = """\
Look at what a network sees.

  passl-visualize attention --image photos/ --pretrained_model dino_deitsmall8_pretrain.pth
  passl-visualize video --input clip.mp4 --pretrained_model dino_deitsmall8_pretrain.pth
  passl-visualize embeddings --images photos/ --pretrained_model output/DINO/latest
  passl-visualize pca --images photos/ --pretrained_model output/DINO/latest
  passl-visualize report output/DINO output/LinearProbe --out report.html

COMMAND --help has more.
"""
_COMMANDS = (attention, video, embeddings, pca, report)


def visualize_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-visualize``"""
    parser = new_parser("passl-visualize", _HELP)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    import_paddle()
    guarded(options.run, options)
