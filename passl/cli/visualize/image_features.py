"""Features with the names, classes and thumbnails of their images: from images and a network, or from files."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from passl.config import ConfigError
from passl.data.image_io import AnyImage, UnreadableImageError, read_source, reduce_to_8_bit
from passl.predict import Picture, SourceError, find_files, pictures, predict

SIDE = 128  # pixels of the longer side of a thumbnail
_SIDE = 224  # of the square that a network sees
_SHOWN = 5  # names in an error


@dataclass
class Table:
    """Rows of one image each.

    Attributes:
        features: [N, D]
        names: [N], paths
        labels: [N], numbers of ``class_names``, -1 for no class; None: there are no classes.
        thumbnails: [N], None where there is none.
        unreadable: what is wrong with each image that was left out.
    """

    features: np.ndarray
    names: list[str]
    labels: Optional[np.ndarray]
    class_names: list[str]
    thumbnails: list[Optional[Image.Image]]
    unreadable: list[str] = field(default_factory=list)


# --- from images -----------------------------------------------------------------------------------------------------


def of_images(subject: Any, sources: Sequence[str], size: Optional[int], limit: Optional[int], options: Any) -> Table:
    """The features that a network gives the images that ``sources`` name.

    Args:
        size: side of the square that the network sees; None: what it was made for.
        limit: so many images at most, see :func:`drawn`.
        options: with batch_size, num_workers, seed, and thumbnails: how many there shall be.

    Raises:
        ConfigError: there are no images, or none can be read, or the network gives no features of images.
        CheckpointError: the features are not finite.
    """
    from passl.checkpoint import CheckpointError

    try:
        files = list(dict.fromkeys(find_files(sources, subject.channels)))
    except SourceError as error:
        raise ConfigError([f"--images {error}"]) from error
    labels, class_names = classes_of(sources, files)
    chosen = drawn(labels if labels is not None else np.zeros(len(files), int), limit, options.seed)
    files = [files[index] for index in chosen]
    label_of = dict(zip(files, labels[chosen].tolist())) if labels is not None else {}
    table = Table(np.zeros((0, 0)), [], None, class_names, [])
    rows, found = [], []
    for path, name, features, error, thumbnail in _run(subject, files, size, options):
        if error is not None:
            table.unreadable.append(f"{name}: {error}")
            continue
        rows.append(features)
        table.names.append(name)
        table.thumbnails.append(thumbnail)
        found.append(label_of.get(path, -1))
    if not rows:
        raise ConfigError(["none of the images can be read:", *table.unreadable[:_SHOWN]])
    table.features = np.stack(rows)
    if not np.isfinite(table.features).all():
        raise CheckpointError("features are not finite: the weights are damaged, or of another network")
    table.labels = np.array(found) if labels is not None else None
    return table


def _run(subject: Any, files: Sequence[str], size: Optional[int], options: Any) -> Iterator[tuple]:
    """File, name, features, error and thumbnail of each picture."""
    import paddle
    from tqdm import tqdm

    from passl import exported

    side = size or default_side(subject.backbone)
    transform = exported.transform(exported.standard_preprocessing(side, side, subject.mean, subject.std))
    wanted = set(drawn(np.zeros(len(files), int), options.thumbnails, options.seed).tolist())
    kept: dict[str, Image.Image] = {}
    owners: dict[str, str] = {}

    def sources() -> Iterator[Picture]:
        for index, path in enumerate(files):
            for picture in pictures([path], channels=subject.channels):
                owners[picture.name] = path
                yield _remembering(picture, kept) if index in wanted else picture

    @paddle.no_grad()
    def network(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": _features(subject, images)}

    results = predict(network, sources(), transform, options.batch_size, options.num_workers)
    for result in tqdm(results, total=len(files), desc="features", unit="image", leave=False, disable=None):
        yield owners.pop(result.name, ""), result.name, result.features, result.error, kept.pop(result.name, None)


def default_side(backbone: Any) -> int:
    """224, or what a vision transformer was trained with where that is less."""
    positions, patch_size = getattr(backbone, "pos_embed", None), getattr(backbone, "patch_size", None)
    if positions is None or patch_size is None or positions.ndim != 3:
        return _SIDE
    return min(_SIDE, math.isqrt(positions.shape[1] - 1) * patch_size) or _SIDE


def _features(subject: Any, images: np.ndarray) -> np.ndarray:
    import paddle

    try:
        found = subject.backbone(paddle.to_tensor(images))
    except (ValueError, TypeError) as error:
        raise ConfigError([f"{subject.name} gives no features of images {list(images.shape)}: {error}"]) from error
    if not isinstance(found, paddle.Tensor) or found.ndim != 2:
        raise ConfigError([f"{subject.name} gives no features [B, D] of images {list(images.shape)}"])
    return found.astype("float32").numpy()


def _remembering(picture: Picture, kept: dict[str, Image.Image]) -> Picture:
    """The same picture, which leaves its thumbnail in ``kept`` when it is read."""

    def read() -> AnyImage:
        image = picture.read()
        kept[picture.name] = thumbnail(image)
        return image

    return Picture(picture.name, read)


def thumbnail(image: AnyImage) -> Image.Image:
    """A small copy in mode RGB. Of arrays [H, W, C] the first three channels, or the first as grey."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        channels = [reduce_to_8_bit(array[..., index]) for index in range(array.shape[2])][:3]
        image = Image.fromarray(np.stack(channels, axis=2) if len(channels) == 3 else channels[0])
    small = image.convert("RGB")
    if small is image:
        small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small


def classes_of(sources: Sequence[str], files: Sequence[str]) -> tuple[Optional[np.ndarray], list[str]]:
    """Labels [N] and class names by the folders in the one folder that ``sources`` names; None: it has images of its
    own, or there are several sources.
    """
    root = Path(os.path.expanduser(sources[0]))
    if len(sources) != 1 or not root.is_dir():
        return None, []
    parts = [Path(path).relative_to(root).parts for path in files]
    if any(len(part) < 2 for part in parts):
        return None, []
    class_names = sorted({part[0] for part in parts})
    number = {name: index for index, name in enumerate(class_names)}
    return np.array([number[part[0]] for part in parts]), class_names


def drawn(labels: np.ndarray, limit: Optional[int], seed: int) -> np.ndarray:
    """Up to ``limit`` indices, sorted: drawn at random, as evenly over the classes as they have members."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    # The number of each among the drawn of its class: all first ones, then all second ones ...
    turn = np.zeros(len(labels), int)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


# --- from files ------------------------------------------------------------------------------------------------------


def of_file(path: Path, root: Optional[str], limit: Optional[int], options: Any) -> Table:
    """The rows of ``path``, as the evaluator Features writes them with a table beside it.

    root: the folder that the paths in the table start from, for thumbnails; None: there are none.

    Raises:
        UnreadableImageError: the file is missing, damaged or of another kind.
        ConfigError: the table does not fit it, or a row is not finite.
    """
    from passl.data.feature_files import read_features

    features = read_features(path)
    if features.ndim != 2 or not len(features):
        raise ConfigError([f"{path}: features must be [N, D] with N > 0, and these are {list(features.shape)}"])
    names, labels, class_names = _index(path, len(features))
    chosen = drawn(labels if labels is not None else np.zeros(len(features), int), limit, options.seed)
    names = [names[index] for index in chosen]
    rows = np.array(features[chosen], np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        listed = ", ".join(names[index] for index in bad[:_SHOWN])
        raise ConfigError([f"{path}: the features of {len(bad)} rows are not finite: {listed}"])
    table = Table(rows, names, labels[chosen] if labels is not None else None, class_names, [None] * len(names))
    if root is not None:
        _add_thumbnails(table, Path(os.path.expanduser(root)), options)
    return table


def _add_thumbnails(table: Table, root: Path, options: Any) -> None:
    if not root.is_dir():
        raise ConfigError([f"--images {root}: the folder that the paths in the table start from is not there"])
    for index in drawn(np.zeros(len(table.names), int), options.thumbnails, options.seed):
        name = table.names[index]
        try:
            table.thumbnails[index] = thumbnail(read_source(root / name).image())
        except UnreadableImageError as error:
            table.unreadable.append(f"{name}: {error.reason}")


def _index(path: Path, count: int) -> tuple[list[str], Optional[np.ndarray], list[str]]:
    """Names, labels and class names of the rows: from the .csv beside the file, that of all arrays in the folder
    (``passl-eval features``), or the .txt of ``passl-predict``.
    """
    table, lines = path.with_suffix(".csv"), path.with_suffix(".txt")
    source = next((one for one in (table, path.with_name("index.csv"), lines) if one.is_file()), None)
    if source is None:
        raise ConfigError(
            [f"{path}: there is no {table.name} or index.csv beside it, which says of each row whose it is"]
        )
    try:
        with source.open(encoding="utf-8", newline="") as file:
            if source is not lines:
                reader = csv.DictReader(file)
                rows, columns = list(reader), reader.fieldnames or []
            else:
                rows, columns = [{"path": line} for line in file.read().splitlines()], ["path"]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"{source}: no table in UTF-8 ({error})"]) from error
    if "path" not in columns:
        raise ConfigError([f"{source}: its first line must name the columns, path among them"])
    if len(rows) != count:
        raise ConfigError([f"{source}: {len(rows)} rows for {count} rows of {path}"])
    names = [row["path"] or "" for row in rows]
    key = "class" if "class" in columns else "label" if "label" in columns else None
    if key is None:
        return names, None, []
    values = [row[key] or "" for row in rows]
    if key == "label":
        values = ["" if value == "-1" else value for value in values]
    # Numbers by their size, before names.
    ordered = sorted(set(values) - {""}, key=lambda v: (0, int(v), v) if v.isdecimal() else (1, 0, v))
    if not ordered:
        return names, None, []
    number = {value: index for index, value in enumerate(ordered)}
    return names, np.array([number.get(value, -1) for value in values]), ordered
