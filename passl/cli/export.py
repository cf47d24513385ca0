"""``passl-export``: a trained network as one file that classifies or gives features anywhere."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from passl.cli.common import CONFIG_ERROR, guarded, image_size, import_paddle, new_parser, stop

if TYPE_CHECKING:
    from passl.config import Config
    from passl.engine.export import ExportOptions

_HELP = """\
Write a network as one file for inference: Paddle's (.passl) or ONNX (.onnx), with its preprocessing and class names
inside, for any batch size. Its outputs are compared with the network's own; a file that differs is not written.

  a linear probe, with the image size, preprocessing and classes of its configuration:
    passl-export -c probe.yaml -o Global.pretrained_model=output/LinearProbe/best --out birds.passl
  a backbone alone, for features, at any size:
    passl-export --arch vit_small --set patch_size=8 --pretrained-model dino_s8 --image-size dynamic
  a backbone that classifies by its nearest neighbours among the images in class folders, no training needed:
    passl-export --arch vit_small --pretrained-model dino_s16 --knn-bank photos/train --out photos.onnx
  for a C++ program, Paddle's separate files too:
    passl-export -c probe.yaml -o Global.pretrained_model=output/LinearProbe/best --raw deploy/

Then: passl-predict birds.passl holiday/*.jpg
"""


def export_main(arguments: Optional[Sequence[str]] = None) -> None:
    """``passl-export``"""
    options = _options(arguments)
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's C++ parts report each pass otherwise
    from passl.config import Config, ConfigError, load
    from passl.yaml_io import parse

    try:
        if options.arch is None:
            config = load(options.config, options.override)
        else:
            model = {"name": options.arch}
            for text in options.set:
                key, _, value = text.partition("=")
                model[key] = parse(value, f"--set {key}")
            config = Config({"Model": model}, {(): "--arch"})
        settings = config.get("Global") or {}
        if options.pretrained_model is not None and isinstance(settings, Mapping):  # else the check below names it
            config["Global"] = {**settings, "pretrained_model": options.pretrained_model}
        import_paddle()
        from passl.engine.export import ExportOptions
        from passl.engine.run import checked

        config = checked(config, training=False)
    except ConfigError as error:
        stop(error, CONFIG_ERROR)
    names = ("out", "image_size", "class_names", "knn_bank", "k", "temperature", "batch_size", "num_workers", "raw")
    given = {name: getattr(options, name) for name in names}
    guarded(_export, config, ExportOptions(export_type=_export_type(options), **given))


def _export(config: Config, options: ExportOptions) -> None:
    from passl.engine.export import export_config
    from passl.export import comparison_table

    out, meta = export_config(config, options)
    print(comparison_table(meta))
    height, width = meta.input_shape[2:]
    size = f"{height} x {width}" if height else f"any, in multiples of {meta.multiple_of}"
    kind = f"{len(meta.class_names)} classes ({meta.classifier['kind']})" if meta.classifier else "features"
    print(f"{out}: {kind}, images {size}, {out.stat().st_size / 1e6:.1f} MB")
    if options.raw is not None:
        print(f"{options.raw}: the same as separate files")


def _options(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.arch and options.override:
        parser.error("-o changes a configuration (-c): use --set " + options.override[0].rpartition(".")[2])
    if options.config and options.set:
        parser.error(f"--set is for --arch: use -o Model.{options.set[0]}")
    for text in options.set:
        if "=" not in text:
            parser.error(f"--set {text}: expected KEY=VALUE, such as patch_size=8")
    return options


def _export_type(options: argparse.Namespace) -> Optional[str]:
    """What --format says, or else the end of --out's name; None: what the configuration says."""
    if options.format is None and options.out is not None:
        return "onnx" if options.out.endswith(".onnx") else "paddle"
    return options.format


def _image_size_or_dynamic(text: str) -> tuple[Optional[int], Optional[int]]:
    return (None, None) if text == "dynamic" else image_size(text)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("passl-export", _HELP)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-c", "--config", metavar="FILE", help="the YAML file that the weights were trained with")
    source.add_argument("--arch", metavar="NAME", help="a backbone alone, by its name: vit_small, resnet50, ...")
    add(
        "-o", "--override", action="append", default=[], metavar="A.B.0.C=VALUE",
        help="change one value of the configuration; may be given many times",
    )  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of --arch, such as patch_size=8")
    add(
        "--pretrained-model", "--pretrained_model", metavar="FILE",
        help="weights (the same as -o Global.pretrained_model=FILE)",
    )  # fmt: skip
    add("--out", metavar="FILE", help="file to write, .passl or .onnx (default: the model's name)")
    add("--format", choices=("paddle", "onnx"), help="default: by --out, or Export.export_type of the configuration")
    add(
        "--image-size", type=_image_size_or_dynamic, metavar="SIZE",
        help="224, 480x640 (height x width), or dynamic: any multiples of the patch "
        "(default: Export.input_shape or the validation transform of the configuration, or 224)",
    )  # fmt: skip
    add("--class-names", metavar="FILE", help="one name a line (default: the folders of DataLoader.Eval, or numbers)")
    add("--knn-bank", metavar="FOLDER", help="class folders: classify by the nearest of these images")
    add("--k", type=int, default=20, help="neighbours that vote, with --knn-bank (default %(default)s)")
    add("--temperature", type=float, default=0.07, help="of the votes, with --knn-bank (default %(default)s)")
    add("--batch-size", type=int, default=32, help="images at a time, for --knn-bank (default %(default)s)")
    add("--num-workers", type=int, default=0, help="processes that load images, for --knn-bank (default %(default)s)")
    add("--raw", metavar="FOLDER", help="write Paddle's program, weights and meta.json as separate files too")
    return parser
