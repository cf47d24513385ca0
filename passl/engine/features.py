"""The features of images as files, by any network."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import paddle

from passl import distributed, exported, log
from passl.config import Config, ConfigError
from passl.data.datasets import ImageFiles, ImageFolder, ImageList
from passl.engine import subject
from passl.engine.folder_lock import FolderInUseError, FolderLock
from passl.evaluators.evaluator import EvaluationError
from passl.evaluators.feature_rows import KINDS, write_rows
from passl.predict import SourceError, find_files

logger = logging.getLogger("passl")


@dataclass
class FeatureOptions:
    """What ``passl-eval features`` is told beside the network.

    Attributes:
        images: a folder, a list, or files and patterns.
        out: folder for ``cls.npy``, ``patch.npy``, ``mean.npy`` and ``index.csv``.
        what, layer, dtype: as in the evaluator `Features`.
        image_size: height and width that the network sees.
    """

    images: Sequence[str]
    out: str
    what: Sequence[str] = ("cls",)
    layer: int = -1
    image_size: tuple[int, int] = (224, 224)
    dtype: str = "float32"
    batch_size: int = 32
    num_workers: int = 0


def extract(config: Config, options: FeatureOptions) -> tuple[int, dict[Path, tuple[int, ...]]]:
    """The number of rows written, and of each file the shape of one.

    Raises:
        ConfigError: the images are not there, or something said of the network is wrong.
        CheckpointError: the weights are not there, or of another network.
        EvaluationError: the network has no such features, or they are not finite.
        BadSamplesError: no image can be read.
        FolderInUseError: another process writes to the folder.
    """
    network = subject.load(config, "computing features of")
    log.setup(quiet=not distributed.is_main())
    transform = exported.transform(
        exported.standard_preprocessing(*options.image_size, mean=network.mean, std=network.std)
    )
    try:
        dataset = _dataset(options.images, transform, network.channels)
    except (SourceError, FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ConfigError([f"--images: {error}"]) from error
    dataset.max_bad_samples = len(dataset)  # they are left out
    folder = Path(options.out).expanduser()
    targets = {kind: folder / f"{kind}.npy" for kind in options.what}
    logger.info("%d images, %s, %s", len(dataset), network.name, paddle.get_device())
    with _locked(folder), paddle.no_grad():
        try:
            count, shapes = write_rows(
                network.backbone,
                dataset,
                targets,
                folder / "index.csv",
                options.layer,
                options.dtype,
                options.batch_size,
                options.num_workers,
                numbered=True,
                others=[folder / f"{kind}.npy" for kind in KINDS if kind not in options.what],
            )
        except ValueError as error:
            raise EvaluationError(f"features: {error}") from error
    return count, {targets[kind]: shape for kind, shape in shapes.items()} if distributed.is_main() else {}


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    """Holds the folder, on the process that gives the files their names."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            try:
                stack.enter_context(FolderLock(folder))
            except FolderInUseError:
                raise FolderInUseError(
                    f"another run writes to {folder}: wait for its end, or give another folder as --out"
                ) from None
            for name in ("index.csv", *(f"{kind}.npy" for kind in KINDS)):
                for left in folder.glob(f"{name}.*.partial"):  # by a killed run
                    left.unlink()
        yield


def _dataset(sources: Sequence[str], transform: Any, channels: Optional[int]) -> ImageFiles:
    """Class folders, where ``sources`` is one folder that holds them, or a list's images, or those that are found."""
    path = os.path.expanduser(sources[0])
    if len(sources) == 1 and os.path.isdir(path):
        try:
            return ImageFolder(path, transform, channels=channels)
        except (FileNotFoundError, ValueError) as error:
            dataset = ImageList(path, transform=transform, channels=channels)
            logger.info("no labels: %s", str(error).split(", but")[0])
            return dataset
    if len(sources) == 1 and path.lower().endswith((".csv", ".txt")):
        return ImageList(list_file=path, transform=transform, channels=channels)
    return ImageFiles(find_files(sources, channels), None, [], transform, 0, channels)
