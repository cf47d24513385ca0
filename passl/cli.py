"""The console commands. Paddle is imported only once there is something to run: ``--help`` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import passl

CONFIG_ERROR, RUN_ERROR = 2, 1

_TRAIN_HELP = """\
Train what a configuration describes: DINO pre-training, or a linear probe on a frozen backbone.

  passl-train -c configs/dino/dino_deit_small_patch16_224_pt_in1k_1n8c_dp_fp16o1.yaml
  passl-train -c probe.yaml -o Global.pretrained_model=output/DINO/latest
  passl-train -c pretrain.yaml -o Global.checkpoint=auto                  go on after a crash, bit for bit
  python -m paddle.distributed.launch --devices 0,1,2,3 $(which passl-train) -c pretrain.yaml
"""
_EVAL_HELP = """\
Score frozen weights with the evaluators of a configuration (KNN, Classification).

  passl-eval -c configs/demo/knn.yaml -o Global.pretrained_model=output/DINO/latest
"""
_DATA_HELP = "Make and check data sets."


def train_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-train``"""
    _run(_config_parser("passl-train", _TRAIN_HELP).parse_args(arguments), training=True)


def eval_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-eval``"""
    _run(_config_parser("passl-eval", _EVAL_HELP).parse_args(arguments), training=False)


def data_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-data``"""
    parser = _parser("passl-data", _DATA_HELP)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="draw the demo data set: ten classes of shapes on clutter",
        description="Draw the demo data set: ten classes of shapes. Colour, pose, size, texture and clutter say "
        "nothing about the class.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add("--out", type=Path, required=True, help="folder to make; gets {train,val}/<class>/<number>.png")
    add("--train-per-class", type=int, default=500, help="training images of each class")
    add("--val-per-class", type=int, default=100, help="validation images of each class")
    add("--size", type=int, default=48, help="side of the images in pixels")
    add("--seed", type=int, default=0, help="another seed draws other images")
    _make_demo(parser.parse_args(arguments))


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"passl {passl.__version__}")
    return parser


def _config_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = _parser(name, description)
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "-o", "--override", action="append", default=[], metavar="A.B.0.C=VALUE",
        help="change one value of the configuration, typed as in YAML; may be given many times",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="check the whole configuration, list every error, build nothing (files in a folder _base_ may be partial)",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    return parser


def _run(options: argparse.Namespace, training: bool) -> None:
    from passl.config import ConfigError, load, to_yaml
    from passl.schema import MISSING

    try:
        config = load(options.config, options.override)
        if options.print_config and not options.check:
            print(to_yaml(config), end="")
            return
        _import_paddle()
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
        _stop(error, CONFIG_ERROR)
    _guarded(run.train if training else run.evaluate_config, ready, config)


def _guarded(function: object, *arguments: object) -> None:
    """Run to the end; an error of the user's gets its message alone, any other its traceback."""
    from passl.checkpoint import CheckpointError
    from passl.config import ConfigError
    from passl.data.loader import BadSamplesError
    from passl.engine.trainer import NonFiniteLossError

    try:
        try:
            function(*arguments)
        except BaseException:
            _outlive_this_process()
            raise
    except ConfigError as error:
        _stop(error, CONFIG_ERROR)
    except (CheckpointError, BadSamplesError, NonFiniteLossError, OSError) as error:
        _stop(error, RUN_ERROR)


def _outlive_this_process() -> None:
    """Keep the connections of a failing process open for some seconds after its end, in an idle child.

    Otherwise the first process fails a moment later, of the broken connection, and the launcher, which looks once a
    second, shows that failure instead of this one.
    """
    if int(os.environ.get("PADDLE_TRAINER_ID") or 0) > 0 and hasattr(os, "fork") and os.fork() == 0:
        time.sleep(8)
        os._exit(0)


def _stop(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def _import_paddle() -> None:
    """Import Paddle on all cores of this process's share, without the warnings it prints about that and about
    ccache.
    """
    # Paddle takes one thread unless told otherwise. Processes on one machine share its cores.
    processes = int(os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("PADDLE_TRAINERS_NUM") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // max(processes, 1), 1)))
    warnings.filterwarnings("ignore", message=".*ccache.*")
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            import paddle  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "paddle":
                raise
            problem = 'PaddlePaddle is not installed: pip install "passl[cpu]", or "passl[gpu]" for CUDA'
            raise SystemExit(f"error: {problem}") from None
    for line in printed.getvalue().splitlines():
        if "OMP_NUM_THREADS" not in line:
            print(line, file=sys.stderr)


def _make_demo(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from passl.data.demo import make_demo

    with tqdm(unit="image", disable=None) as bar:

        def show(drawn: int, total: int) -> None:
            bar.total = total
            bar.update(drawn - bar.n)

        try:
            drawn = make_demo(
                options.out, options.train_per_class, options.val_per_class, options.size, options.seed, progress=show
            )
        except (ValueError, OSError) as error:
            _stop(error, RUN_ERROR)
    print(f"{options.out}: {drawn} images drawn" if drawn else f"{options.out}: complete already")
