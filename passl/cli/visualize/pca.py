"""``passl-visualize pca``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passl.cli import subject
from passl.cli.common import RUN_ERROR, whole_number
from passl.cli.visualize.attention import add_image_size, size_of

if TYPE_CHECKING:
    from PIL import Image

    from passl.cli.visualize.patch_reader import PatchReader

_HELP = """\
What a network sees in each patch, as colours: the first three principal components of the features of all patches.
Equal colours are alike, in all images of a run.

  passl-visualize pca --images photos/ --pretrained_model dino_deitsmall8_pretrain.pth
  passl-visualize pca --images dogs/ --foreground --upsample smooth --pretrained_model dinov2_vits14_pretrain.pth
  passl-visualize pca --images photos/ --per_image --image_size 224 --arch resnet50 --pretrained_model X

It writes NAME_pca.png of each image, and overview.png, images and colours side by side, to --output_dir. An image that
cannot be read is named and left out, and the exit code is then 1.
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "pca",
        help="main directions of the patch features as colours",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--images", "--image", nargs="+", required=True, metavar="DIR",
        help="images, folders of them (with all below), patterns in quotes",
    )  # fmt: skip
    add("--output_dir", "--output-dir", default="output/pca", metavar="DIR", help="default: %(default)s")
    add_image_size(parser, "as it is, at most 448")
    add("--layer", type=int, default=-1, metavar="N", help="number of the block, negative from the end (default: last)")
    add("--per_image", "--per-image", action="store_true", help="components of each image alone: colours differ")
    add("--foreground", action="store_true", help="leave out the background, as the first component shows it")
    add("--upsample", choices=("nearest", "smooth"), default="nearest", help="default: %(default)s")
    add("--batch_size", "--batch-size", type=whole_number(), default=8, metavar="N", help="default: %(default)s")
    add(
        "--num_workers", "--num-workers", type=whole_number(), default=2, metavar="N",
        help="threads that read images (default: %(default)s)",
    )  # fmt: skip
    subject.add_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from passl import log
    from passl.checkpoint import CheckpointError
    from passl.cli.visualize.patch_reader import PatchReader
    from passl.config import ConfigError
    from passl.engine.subject import load
    from passl.predict import SourceError, find_files
    from passl.visualize import pca
    from passl.visualize.principal import NotFiniteError

    log.setup()
    image_size = size_of(options, None)
    network = load(subject.config_of(options), "looking at")
    try:
        # In one order, whatever the order of the options: sums have the same last digit then.
        files = sorted(set(find_files(options.images, network.channels)))
    except SourceError as error:
        raise ConfigError([f"--images {error}"]) from error
    folder = Path(options.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with pca.Spool(folder) as spool:
        reader = PatchReader(network, image_size, options, len(files))
        try:
            for features in reader.maps(files):
                spool.add(features)
            _draw(folder, spool, reader, options)
        except NotFiniteError as error:
            raise CheckpointError(str(error)) from error
        except ValueError as error:
            raise ConfigError([str(error)]) from error
    print(f"{len(reader.names)} image{'s' * (len(reader.names) != 1)}: {folder / 'overview.png'}")
    for problem in reader.unreadable:
        print(f"left out: {log.harmless(problem)}", file=sys.stderr)
    if reader.unreadable:
        sys.exit(RUN_ERROR)


def _draw(folder: Path, spool: Any, reader: PatchReader, options: argparse.Namespace) -> None:
    """Write the pictures. Raises ValueError if no image could be read, or a feature is not finite."""
    from tqdm import tqdm

    from passl.visualize import pca

    if not reader.names:
        raise ValueError("\n".join(["none of the images can be read:", *reader.unreadable[:5]]))
    joint = None if options.per_image else pca.fit(spool, options.foreground)
    pairs = []
    outputs = output_names(reader.names)
    bar = tqdm(spool(), total=len(outputs), desc="pictures", unit="image", leave=False, disable=None)
    for index, features in enumerate(bar):
        colouring = joint or pca.fit(lambda features=features: [features], options.foreground)
        height, width = reader.sizes[index]
        picture = pca.paint(colouring, features, (width, height), options.upsample == "smooth")
        _save(picture, folder / f"{outputs[index]}_pca.png")
        if index in reader.shown:
            pairs.append((reader.shown[index], picture))
    _save(pca.overview(pairs), folder / "overview.png")


def _save(picture: Image.Image, path: Path) -> None:
    from passl.formats.atomic import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        picture.save(file, "PNG")


def output_names(names: Sequence[str]) -> list[str]:
    """What pictures of ``names`` are called: their last part without its ending, or as much more as tells them apart,
    with folders below the one that all share.
    """
    import os

    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    if len(set(stems)) == len(stems):
        return stems
    paths = [os.path.abspath(name) for name in names]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    inside = [os.path.relpath(path, common) for path in paths]
    short = [os.path.splitext(path)[0] for path in inside]
    return short if len(set(short)) == len(short) else inside
