"""``passl-visualize embeddings``"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from passl.cli import subject
from passl.cli.common import RUN_ERROR, whole_number

if TYPE_CHECKING:
    import numpy as np

_HELP = """\
A map of images: what a network finds alike lies together.

  passl-visualize embeddings --images photos/ --pretrained_model dino_deitsmall16_pretrain.pth
  passl-visualize embeddings --images photos/ --pretrained_model output/DINO/latest --method umap --limit 2000
  passl-visualize embeddings --features output/features.npy --images photos/     what passl-eval wrote: no network

Images in class folders get the colours of their classes. It writes to --output_dir: embeddings.png, embeddings.html (a
page to zoom, point at and search, in one file), embeddings.csv (path, class, x, y), and vdl/ with the features
themselves for VisualDL's high-dimensional page. An image that cannot be read is named and left out, and the exit code
is then 1.
"""
_NAMES = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "embeddings",
        help="features of many images on a map",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--images", nargs="+", metavar="DIR",
        help="a folder (its folders are the classes), or files and patterns; with --features where its paths start",
    )  # fmt: skip
    add("--features", metavar="F.npy", help="features of passl-eval in place of a network, with F.csv or index.csv")
    add("--output_dir", "--output-dir", default="output/embeddings", metavar="DIR", help="default: %(default)s")
    add("--method", choices=tuple(_NAMES), default="tsne", help="default: %(default)s; pca needs no extra")
    add("--perplexity", type=float, metavar="P", help="of tsne: about how many neighbours count (default: up to 30)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="the same map for the same number (default: 0)")
    add("--show", choices=("thumbnails", "classes"), help="in embeddings.png (default: classes where there are any)")
    add(
        "--thumbnails", type=whole_number(0), default=2000, metavar="N",
        help="images with a thumbnail, drawn at random; 2 KB of embeddings.html each (default: %(default)s)",
    )  # fmt: skip
    add("--limit", type=whole_number(), metavar="N", help="of so many images only, drawn at random, evenly per class")
    add("--image_size", "--image-size", type=whole_number(), metavar="N", help="side of the square that it sees")
    add("--batch_size", "--batch-size", type=whole_number(), default=32, metavar="N", help="default: %(default)s")
    add(
        "--num_workers", "--num-workers", type=whole_number(0), default=2, metavar="N",
        help="threads that read images (default: %(default)s)",
    )  # fmt: skip
    subject.add_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from passl import log
    from passl.config import ConfigError
    from passl.visualize.embeddings import project, require_method

    log.setup()
    _check(options)
    require_method(options.method)
    folder = Path(options.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # before hours of features and t-SNE, not after
    table = _table(options)
    for problem in table.unreadable:
        print(f"left out: {log.harmless(problem)}", file=sys.stderr)
    logging.getLogger("passl").info("%s of %d x %d features", _NAMES[options.method], *table.features.shape)
    try:
        points = project(table.features, options.method, options.seed, options.perplexity)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    classes = "" if table.labels is None else f" of {len(set(table.labels.tolist()) - {-1})} classes"
    _write_picture(folder / "embeddings.png", table, points, options)
    _write_page(folder / "embeddings.html", table, points)
    _write_csv(folder / "embeddings.csv", table, points)
    _write_visualdl(folder / "vdl", table)
    method, width = _NAMES[options.method], table.features.shape[1]
    print(f"{len(points)} image{'s' * (len(points) != 1)}{classes}, {method} of {width} features: {folder}")
    for name in ("embeddings.png", "embeddings.html", "embeddings.csv"):
        print(f"  {folder / name}")
    print(f"  visualdl --logdir {folder / 'vdl'}")
    if table.unreadable:
        sys.exit(RUN_ERROR)


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that contradict each other."""
    from passl.config import ConfigError

    problems = []
    network = [options.pretrained_model, options.arch, options.config]
    if options.features is None and options.images is None:
        problems.append("no images: give --images DIR, or --features F.npy of passl-eval")
    if options.features is not None and any(network):
        problems.append("--features are there already: no --pretrained_model, --arch or -c with them")
    if options.features is not None and options.images is not None and len(options.images) != 1:
        problems.append("--images with --features is the one folder that the paths in its table start from")
    if options.perplexity is not None and options.method != "tsne":
        problems.append(f"--perplexity is of --method tsne, not of {options.method}")
    if options.perplexity is not None and not options.perplexity > 0:
        problems.append(f"--perplexity ({options.perplexity:g}) must be greater than 0")
    if options.show == "thumbnails" and not options.thumbnails:
        problems.append("--show thumbnails needs some: --thumbnails 0 says none")
    if options.show == "thumbnails" and options.features is not None and options.images is None:
        problems.append("--show thumbnails needs the images: say with --images DIR where they are")
    if problems:
        raise ConfigError(problems)


def _table(options: argparse.Namespace) -> Any:
    from passl.checkpoint import CheckpointError
    from passl.cli.visualize import image_features
    from passl.data.image_io import UnreadableImageError

    if options.features is None:
        from passl.engine.subject import load

        network = load(subject.config_of(options), "looking at")
        return image_features.of_images(network, options.images, options.image_size, options.limit, options)
    root = None if options.images is None else options.images[0]
    try:
        return image_features.of_file(Path(options.features).expanduser(), root, options.limit, options)
    except UnreadableImageError as error:
        raise CheckpointError(f"--features {error}") from error


# --- what is written -------------------------------------------------------------------------------------------------


def _write_picture(path: Path, table: Any, points: np.ndarray, options: argparse.Namespace) -> None:
    from passl.formats.atomic import replacing
    from passl.visualize.scatter import scatter_picture

    show = options.show or ("thumbnails" if table.labels is None else "classes")
    thumbnails = table.thumbnails if show == "thumbnails" else None
    picture = scatter_picture(points, table.labels, table.class_names, thumbnails, _title(len(points), options))
    with replacing(path) as file:
        picture.save(file, "PNG")


def _title(count: int, options: argparse.Namespace) -> str:
    of = options.features or options.pretrained_model or options.arch or options.config
    return f"{_NAMES[options.method]} of {count} image{'s' * (count != 1)}: {of}"


def _write_page(path: Path, table: Any, points: np.ndarray) -> None:
    from passl.formats.atomic import replacing
    from passl.visualize.scatter_page import scatter_html

    with replacing(path) as file:
        page = scatter_html(points, table.labels, table.class_names, table.names, table.thumbnails)
        file.write(page.encode())


def _write_csv(path: Path, table: Any, points: np.ndarray) -> None:
    from passl.formats.atomic import replacing

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "class", "x", "y"))
    for name, label, (x, y) in zip(table.names, _classes(table), points.tolist()):
        writer.writerow((name, label, f"{x:.6g}", f"{y:.6g}"))
    with replacing(path) as file:
        file.write(text.getvalue().encode("utf-8", "replace"))


def _write_visualdl(folder: Path, table: Any) -> None:
    from passl.visualize.visualdl_embeddings import write_embeddings

    write_embeddings(folder, table.features, table.names, None if table.labels is None else _classes(table))


def _classes(table: Any) -> list[str]:
    """The class name of each row, empty without one."""
    labels: Optional[np.ndarray] = table.labels
    if labels is None:
        return [""] * len(table.names)
    return [table.class_names[label] if label >= 0 else "" for label in labels]
