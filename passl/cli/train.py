"""``passl-train`` and ``passl-eval``: what a configuration describes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from passl.cli.common import CONFIG_ERROR, end_with_the_launcher, guarded, import_paddle, new_parser, stop
from passl.cli.features import features_main

_TRAIN_HELP = """\
Train what a configuration describes: DINO pre-training, or a linear probe on a frozen backbone.

  passl-train -c configs/dino/dino_deit_small_patch16_224_pt_in1k_1n8c_dp_fp16o1.yaml
  passl-train -c probe.yaml -o Global.pretrained_model=output/DINO/latest
  passl-train -c pretrain.yaml -o Global.checkpoint=auto                  go on after a crash, bit for bit
  until passl-train -c pretrain.yaml -o Global.checkpoint=auto; do [ $? -eq 75 ] || sleep 60; done
  python -m paddle.distributed.launch --devices 0,1,2,3 $(which passl-train) -c pretrain.yaml

Exit codes: 0 done; 1 the run failed; 2 the configuration is wrong; 75 told to stop (SIGTERM, Ctrl-C) and saved: the
same command with -o Global.checkpoint=auto goes on (docs/faults.md).
"""
_EVAL_HELP = """\
Score frozen weights, or write their features, with the evaluators of a configuration: KNN, Classification, Features,
RegionExtraction (docs/data.md).

  passl-eval -c configs/demo/knn.yaml -o Global.pretrained_model=output/DINO/latest
  passl-eval features --images photos/ --pretrained_model output/DINO/latest --out features/
                                                        features as .npy, without a configuration: features --help
"""


def train_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-train``"""
    _run(_config_parser("passl-train", _TRAIN_HELP).parse_args(arguments), training=True)


def eval_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-eval``, and ``passl-eval features``"""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["features"]:
        features_main(arguments[1:])
        return
    _run(_config_parser("passl-eval", _EVAL_HELP).parse_args(arguments), training=False)


def _config_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = new_parser(name, description)
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "-o", "--override", action="append", default=[], metavar="A.B.0.C=VALUE",
        help="change one value of the configuration, typed as in YAML; may be given many times",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="check the whole configuration, list every error, build nothing (files in a folder _base_ may be partial)",
    )  # fmt: skip
    parser.add_argument(
        "--report", action="store_true",
        help="write report.html at the end: numbers, curves, attention, a map of features (-o Global.report=true)",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    return parser


def _run(options: argparse.Namespace, training: bool) -> None:
    from passl.config import ConfigError, load, to_yaml
    from passl.schema import MISSING

    end_with_the_launcher()
    try:
        config = load(options.config, [*options.override, *["Global.report=true"] * options.report])
        if options.print_config and not options.check:
            print(to_yaml(config), end="")
            return
        import_paddle()
        from passl.engine import run

        try:
            ready = run.checked(config, training)
        except ConfigError as error:
            is_piece = options.check and Path(options.config).resolve().parent.name == "_base_"
            problems = [text for text in error.problems if not (is_piece and text.endswith(MISSING))]
            if problems:
                raise ConfigError(problems) from None
        if options.print_config:
            print(to_yaml(config), end="")
        if options.check:
            print(f"{options.config}: ok", file=sys.stderr)
            return
    except ConfigError as error:
        stop(error, CONFIG_ERROR)
    guarded(run.train if training else run.evaluate_config, ready, config)
