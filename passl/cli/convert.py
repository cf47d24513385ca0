"""``passl-convert``: weights of PyTorch projects in and out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Optional

from passl.cli.common import RUN_ERROR, import_paddle, new_parser, stop

_HELP = """\
Convert weights between PyTorch and Paddle, without PyTorch and without executing anything in the file.

  passl-convert dino_deitsmall8_pretrain.pth pretrained/dino/dino_deitsmall8_pretrain
  passl-convert dino_deitsmall16_pretrain_full_checkpoint.pth runs/official    a whole run, to be continued:
      passl-train -c runs/official.yaml -o Global.checkpoint=runs/official
  passl-convert full_checkpoint.pth student --checkpoint-key student           one backbone of it
  passl-convert dino_deitsmall8_linearweights.pth probe --backbone dino_deitsmall8_pretrain.pth
  passl-convert output/DINO/latest dino.pth --to torch                         and back
  passl-convert weights.pth --verify                                           look and compare, write nothing
  passl-convert weights.pth --verify recorded.npz                              the same without PyTorch

Known: files of the official DINO (old and new), DINOv2, timm, torchvision, Lightning DINO, clemsgrs' patch and
region models, PASSL, and passl's own. What a file is, is read off its names and shapes, and shown.
"""


def convert_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-convert``"""
    parser = _convert_parser()
    options = parser.parse_args(arguments)
    if options.destination is None and not options.verify and not options.dry_run:
        parser.error("DST is missing (--dry-run or --verify need none)")
    import_paddle()
    from passl.checkpoint import CheckpointError
    from passl.convert import CheckpointFormatError

    try:
        _convert(options)
    except (CheckpointFormatError, CheckpointError, OSError) as error:
        stop(error, RUN_ERROR)


def _convert_parser() -> argparse.ArgumentParser:
    parser = new_parser("passl-convert", _HELP)
    add = parser.add_argument
    add("source", metavar="SRC", help=".pth, .pt, .pth.tar, .ckpt, .safetensors, .pdparams, or a prefix")
    add("destination", metavar="DST", nargs="?", help="prefix (Paddle) or file (--to); a folder takes SRC's name")
    add("--to", choices=("paddle", "torch", "safetensors"), default="paddle", help="format of DST (%(default)s)")
    add("--kind", choices=("run", "network", "backbone", "probe", "linear"), help="what SRC holds, else inferred")
    add("--arch", metavar="NAME", help="a registered backbone (passl.list_models()), else inferred")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="argument of the architecture: num_heads=6")
    add("--checkpoint-key", choices=("teacher", "student"), help="of a run, only this network's backbone")
    add("--backbone", metavar="FILE", help="the backbone below a linear classifier: makes a whole probe")
    add("--allow", action="append", default=[], metavar="PATTERN", help="keys that may be left over: 'head.*'")
    add(
        "--verify", nargs="?", const=True, metavar="RECORDED.npz",
        help="compare outputs: with PyTorch where that is installed, running the original, or with a recording: arrays "
        "'input' (or 'input_u8': bytes for value * 2**-6 - 2) and 'output' (or 'forward'), or pairs 'NAME/input', "
        "'NAME/output'; outputs of the backbone (of a run the teacher's), or logits of a classifier",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="show what SRC is and what would become of it, write nothing")
    add("-v", "--verbose", action="store_true", help="name all tensors that matched")
    return parser


def _convert(options: argparse.Namespace) -> None:
    from passl.convert import convert

    written = convert(
        options.source,
        None if options.dry_run else options.destination,
        to=options.to,
        kind=options.kind,
        arch=options.arch,
        arguments=_settings(options.set),
        checkpoint_key=options.checkpoint_key,
        backbone=options.backbone,
        allow=options.allow,
        check=lambda conversion: _show(options, conversion),
    )
    for note in written.notes:
        print(f"note: {note}")
    for file in written.files:
        print(f"written: {file}")


def _show(options: argparse.Namespace, conversion: Any) -> None:
    """Print what was found, and verify it where that is wanted: nothing has been written by now."""
    print(f"{options.source}: {_described(conversion)}")
    for line in conversion.report.lines(options.verbose):
        print(f"  {line}")
    if options.to == "paddle" and conversion.architecture is not None:
        for name in conversion.architecture.unknown:
            print(
                f"  {name} is not visible in the file, and the weights do not depend on it; --set {name}=VALUE tells it"
            )
    if options.verify:
        from passl.convert.verify import verify

        recorded = None if options.verify is True else options.verify
        for line in verify(options.source, conversion, recorded, options.backbone):
            print(f"  {line}")


def _described(conversion: Any) -> str:
    from passl.convert.conversion import KINDS
    from passl.convert.layout import size_of

    model = ", ".join(f"{key}: {_shown(value)}" for key, value in conversion.model.items())
    return f"{KINDS[conversion.kind]} ({size_of(conversion.layout) / 1e6:.2f} M values)\n  {model}"


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    from passl.convert import CheckpointFormatError
    from passl.yaml_io import parse

    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise CheckpointFormatError(f"--set {text}: write KEY=VALUE, for example --set num_heads=6")
        settings[key] = parse(value, f"--set {key}")
    return settings
