"""``passl-visualize attention``"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Optional, Union

from passl.cli import subject
from passl.cli.common import RUN_ERROR, stop

_HELP = """\
What the [CLS] token attends to, in each head of a block:

  passl-visualize attention --image cat.jpg --pretrained_model dino_deitsmall8_pretrain.pth --output_dir cat/
  passl-visualize attention --image photos/ --threshold 0.6 --pretrained_model output/DINO/latest --output_dir maps/
  passl-visualize attention --image cat.jpg --point 120,80 --arch resnet50 --pretrained_model X

It writes img.png (the image as the network sees it), attn-head0.png ..., overview.png (all on one sheet); with
--threshold also mask_th0.6_head0.png ... and boxes.json. For several images each has a folder of its name.
With --similarity or --point: similarity.png, how alike all patches are to one; it works for any network.
An image that cannot be read is named and left out, and the exit code is then 1.
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "attention",
        help="what the [CLS] token attends to",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--image", "--image_path", "--image-path", nargs="+", required=True, metavar="F|DIR|GLOB",
        help="images, folders of them (with all below), patterns in quotes",
    )  # fmt: skip
    add_image_size(parser, "480 480")
    add("--output_dir", "--output-dir", default=".", metavar="DIR", help="default: the current folder")
    add(
        "--threshold", type=share, metavar="T",
        help="also draw masks of the patches that hold this share of the attention, such as 0.6, and boxes around them",
    )  # fmt: skip
    add("--boxes", action="store_true", help="boxes.json without saying --threshold (0.6 then)")
    add_view(parser)
    add("--similarity", action="store_true", help="of all patches to one, that in the middle or at --point")
    add("--point", type=_point, metavar="X,Y", help="pixels of the image as it is stored, or shares such as 0.5,0.5")
    add(
        "--cmap", default="inferno", metavar="NAME", help="colours of overview.png, of matplotlib (default %(default)s)"
    )
    subject.add_options(parser)
    parser.set_defaults(run=_run)


# --- options that the commands share ---------------------------------------------------------------------------------


def add_image_size(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--image_size", "--image-size", nargs="+", type=_sides, metavar="N",
        help=f"one number: of the shorter side; two, or 480x640: height and width (default: {default})",
    )  # fmt: skip


def add_view(parser: argparse.ArgumentParser, head: str = "all") -> None:
    """--layer, --head, --rollout"""
    add = parser.add_argument
    add("--layer", type=int, default=-1, metavar="N", help="number of the block, negative from the end (default: last)")
    add("--head", type=_head, metavar="all|mean|N", help=f"which heads (default: {head})")
    add("--rollout", action="store_true", help="attention through all blocks up to --layer (Abnar & Zuidema 2020)")


def view_of(options: argparse.Namespace, head: Union[int, str] = "all") -> Any:
    """The View that --layer, --head and --rollout mean. Raises ConfigError."""
    from passl.config import ConfigError
    from passl.visualize.attention_view import View

    if options.rollout and options.head not in (None, "mean"):
        raise ConfigError(["--head: --rollout averages the heads, leave one of the two out"])
    return View(options.layer, head if options.head is None else options.head, options.rollout)


def size_of(options: argparse.Namespace, default: Any) -> Union[int, list[int], None]:
    """What --image_size means: the shorter side, or [height, width]. Raises ConfigError."""
    from passl.config import ConfigError

    if options.image_size is None:
        return default
    sides = [side for part in options.image_size for side in part]
    if len(sides) > 2:
        raise ConfigError([f"--image_size {' '.join(map(str, sides))}: one number, or height and width"])
    return sides[0] if len(sides) == 1 else sides


def _sides(text: str) -> list[int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of pixels such as 480, or 480x640")
    return [int(side) for side in sides]


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1, such as 0.6")
    return value


def _head(text: str) -> Union[int, str]:
    if text in ("all", "mean"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be all, mean, or a number from 0")
    return int(text)


def _point(text: str) -> tuple[float, float, bool]:
    """x, y, and whether they are shares of width and height"""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = -1.0
    shares = "." in text and 0 <= x <= 1 and 0 <= y <= 1
    if not (x >= 0 and y >= 0 and x + y < float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r} must be X,Y in pixels, such as 120,80, or shares such as 0.5,0.25")
    return x, y, shares


# --- the command -----------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from passl.config import ConfigError
    from passl.data.image_io import UnreadableImageError
    from passl.engine.subject import load
    from passl.log import harmless
    from passl.visualize.attention_files import folder_names

    _check(options)
    network = load(subject.config_of(options), "looking at")
    files = _images(options.image, network.channels)
    output = Path(options.output_dir).expanduser()
    folders = [output] if len(files) == 1 else [output / name for name in folder_names(files)]
    _spare(files, folders)
    problems = []
    for file, folder in zip(tqdm(files, unit="image", disable=None if len(files) > 1 else True), folders):
        try:
            prepared = _prepared(file, options, network)
        except UnreadableImageError as error:
            problems.append(f"  {harmless(str(error))}")
            continue
        try:
            _write(folder, file, prepared, options, network.backbone)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        except MemoryError as error:
            size = " x ".join(map(str, prepared.size))
            message = f"--image_size: the memory does not suffice for {size} pixels ({file}), give a smaller one"
            raise ConfigError([message]) from error
        tqdm.write(harmless(str(folder / "overview.png")))
    if problems:
        print("\n".join([f"{len(problems)} could not be read and are left out:", *problems]), file=sys.stderr)
        sys.exit(RUN_ERROR)


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that contradict each other."""
    from passl.config import ConfigError
    from passl.visualize.attention_maps import coloured

    size_of(options, None)
    options.view = view_of(options)
    given = [
        name
        for name, value in (
            ("--head", options.head is not None),
            ("--rollout", options.rollout),
            ("--threshold", options.threshold is not None),
            ("--boxes", options.boxes),
        )
        if value
    ]
    if given and (options.similarity or options.point is not None):
        raise ConfigError([f"{', '.join(given)}: of attention, and --similarity and --point are about features"])
    try:
        coloured([[0.0]], options.cmap)
    except ValueError as error:
        raise ConfigError([f"--cmap: {error}"]) from error


def _images(sources: list[str], channels: Optional[int]) -> list[str]:
    """The images under ``sources``; an error ends the program."""
    from passl.predict import VIDEO_SUFFIXES, SourceError, find_files

    try:
        files = find_files(sources, channels)
        images = [file for file in files if Path(file).suffix.lower() not in VIDEO_SUFFIXES]
        if not images:
            raise SourceError(f"{', '.join(sources)}: videos only: passl-visualize video is for them")
        return images
    except SourceError as error:
        return stop(error, RUN_ERROR)


def _spare(files: list[str], folders: list[Path]) -> None:
    """Raises ConfigError if an image would be overwritten."""
    from passl.config import ConfigError

    written = {folder.resolve() for folder in folders}
    for path in (Path(file).resolve() for file in files):
        is_ours = re.fullmatch(r"(img|overview|similarity|attn-\w+|mask_th[\d.e-]+_\w+)\.png", path.name)
        if is_ours and path.parent in written:
            raise ConfigError([f"--output_dir: {path} would be overwritten, choose another folder"])


def _prepared(file: str, options: argparse.Namespace, network: Any) -> Any:
    """Raises UnreadableImageError, also for an image of a size that the options do not fit."""
    from passl.data.image_io import UnreadableImageError, read_source
    from passl.models.tokens import patch_size_of
    from passl.visualize.attention_image import prepare

    image = read_source(file, network.channels).image()
    size = size_of(options, [480, 480])
    try:
        prepared = prepare(image, size, patch_size_of(network.backbone), network.mean, network.std)
        if options.point is not None:
            prepared.patch_at(*_place(options, prepared), (1, 1))
        return prepared
    except ValueError as error:
        raise UnreadableImageError(file, str(error)) from error


def _write(folder: Path, file: str, prepared: Any, options: argparse.Namespace, backbone: Any) -> None:
    from passl.visualize.attention_files import DEFAULT_THRESHOLD, write_attention, write_similarity

    if options.similarity or options.point is not None:
        write_similarity(folder, backbone, prepared, _place(options, prepared), options.layer, options.cmap)
        return
    threshold: Optional[float] = options.threshold
    if threshold is None and options.boxes:
        threshold = DEFAULT_THRESHOLD
    write_attention(folder, backbone, file, prepared, options.view, threshold, options.cmap)


def _place(options: argparse.Namespace, prepared: Any) -> tuple[float, float]:
    """What --point means, in pixels of the original image."""
    x, y, shares = options.point or (0.5, 0.5, True)
    height, width = prepared.original
    return (x * width, y * height) if shares else (x, y)
