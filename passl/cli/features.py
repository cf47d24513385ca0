"""``passl-eval features``: what a network says of images, as arrays."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from passl.cli import subject
from passl.cli.common import end_with_the_launcher, guarded, image_size, import_paddle, new_parser, whole_number

_HELP = """\
Write the features of images as .npy files, whose rows --out/index.csv lists: path, label and class where the images are
in class folders, row.

  passl-eval features --images photos/ --pretrained_model output/DINO/latest --out features/
  passl-eval features --images photos/ --pretrained_model dino_s16.pth --out features/ --what cls,patch,mean
  passl-eval features --images list.csv --arch vit_small --set patch_size=8 --out features/ --dtype float16
  python -m paddle.distributed.launch --nproc_per_node 4 $(which passl-eval) features --images ...

  cls.npy    [N, D]        the network's output: a transformer's normalised [CLS], a convolutional network's mean
  patch.npy  [N, h, w, D]  of each patch, through the final norm
  mean.npy   [N, D]        the mean of the patches

Rows are in the order of the paths, for any number of processes, each of which computes a share; they are written as
they come, so that memory does not grow with them. Images that cannot be read are named and left out. Files take their
names when all are whole, index.csv last.
"""


def features_main(arguments: Sequence[str]) -> None:
    """``passl-eval features``"""
    options = _parser().parse_args(arguments)
    end_with_the_launcher()
    import_paddle()
    guarded(_run, options)


def _run(options: argparse.Namespace) -> None:
    from passl.engine.features import FeatureOptions, extract

    names = ("images", "out", "layer", "image_size", "dtype", "batch_size", "num_workers")
    given = {name: getattr(options, name) for name in names}
    count, files = extract(subject.config_of(options), FeatureOptions(what=tuple(options.what), **given))
    for path, shape in files.items():
        print(f"{path}: {' x '.join(map(str, (count, *shape)))} {options.dtype}", file=sys.stderr)


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    unknown = [kind for kind in kinds if kind not in ("cls", "patch", "mean")]
    if unknown or len(set(kinds)) < len(kinds):
        raise argparse.ArgumentTypeError(f"{text!r} must be one or more of cls,patch,mean, each once")
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("passl-eval features", _HELP)
    add = parser.add_argument
    add(
        "--images", nargs="+", required=True, metavar="SOURCE",
        help="a folder, with all below it; a list (.csv with a column path, .txt); files, or patterns in quotes",
    )  # fmt: skip
    add("--out", "--output_dir", "--output-dir", required=True, metavar="DIR", help="folder for the files")
    add("--what", type=_kinds, default=["cls"], metavar="KINDS", help="of cls,patch,mean (default: cls)")
    add("--layer", type=int, default=-1, metavar="N", help="block, from 0; negative from the end (default: -1)")
    add(
        "--image_size", "--image-size", type=image_size, default=(224, 224), metavar="SIZE",
        help="a side, such as 224: shorter side resized to 8/7 of it, its centre cut out (default: 224, by 256); "
        "480x640 (height x width): resized to that",
    )  # fmt: skip
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the files (default: %(default)s)")
    add("--batch_size", "--batch-size", type=whole_number(), default=32, metavar="N", help="default: %(default)s")
    add(
        "--num_workers", "--num-workers", type=whole_number(0), default=0, metavar="N",
        help="processes that load images, for each process (default: %(default)s)",
    )  # fmt: skip
    subject.add_options(parser)
    return parser
