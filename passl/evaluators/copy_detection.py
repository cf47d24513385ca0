"""Copy detection on Copydays, by the official DINO's protocol."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import paddle
from paddle import nn

from passl.data.datasets import ImageFiles
from passl.data.image_io import image_extensions
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Compose, Normalize, Resize, ToTensor
from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import Evaluator
from passl.evaluators.image_features import cut_to_patches, rows_of_all, unit_rows
from passl.evaluators.ranking import average_precision, descending
from passl.models.tokens import patch_features, patch_size_of
from passl.models.vision_transformer import TokenTransformer
from passl.registry import EVALUATORS

BLOCKS = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{share}" for share in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)
_RETRIEVED = 20  # originals further down the ranking count as not found
_PREFIX = 4  # letters of a file's name that an original and its strong copies share
_GEM_POWER = 4


@EVALUATORS.register()
class CopyDetection(Evaluator):
    """`copydays_mAP_strong`, and the same of every block of copies that is there (`copydays_mAP_jpegqual_3`,
    `copydays_mAP_crops_10`, `copydays_mAP_original`), in percent.

    A feature is [CLS] and the patches' features under a generalised mean of power 4, one behind the other; a
    convolutional network has the second alone. Copies are searched for among the originals and the distractors; what is
    not among the first 20 is not found.

    Args:
        root: folder with `original`, `strong` and, if there, `jpegqual/{quality}` and `crops/{share}`; `*.jpg`. The
            originals of a strong copy have names that begin with the same four letters; the other blocks have the
            originals' files, in the same order.
        distractors: folder of images that are copies of nothing. The official protocol has 10,000 of YFCC100M.
        whitening: folder of images that the whitening is learned on, or null for none. The official has 20,000.
        image_size: every image is made a square of so many pixels.
        max_bad_samples: how many of the distractors, and of the images for whitening, may be unreadable.
    """

    def __init__(
        self,
        root: str,
        distractors: Optional[str] = None,
        whitening: Optional[str] = None,
        image_size: int = 320,
        batch_size: int = 16,
        num_workers: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_bad_samples: int = 0,
    ) -> None:
        check_batches(batch_size, num_workers)
        if image_size < 1:
            raise ValueError(f"image_size ({image_size}) must be at least 1")
        size = Resize([image_size, image_size], "bicubic")
        self.transform = Compose([size, ToTensor(), Normalize(mean, std)])
        self.batch_size = batch_size
        self.num_workers = num_workers
        paths = _blocks(Path(root).expanduser())
        self.positives = {block: _positives(paths["original"], block, paths[block]) for block in paths}
        self.blocks = {block: ImageFiles(files, None, (), self.transform, 0) for block, files in paths.items()}
        self.distractors, self.whitening = (
            None if folder is None else ImageFiles(_plain_images(folder), None, (), self.transform, max_bad_samples)
            for folder in (distractors, whitening)
        )
        self.key_metric = _name("strong" if "strong" in paths else next(reversed(paths)))

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        features = {block: self._features(model, images, block) for block, images in self.blocks.items()}
        database = features["original"]
        if self.distractors is not None:
            database = np.concatenate([database, self._features(model, self.distractors, "distractors")])
        if self.whitening is not None:
            mean, matrix = learn_whitening(self._features(model, self.whitening, "whitening"))
            database = (database - mean) @ matrix
            features = {block: (rows - mean) @ matrix for block, rows in features.items()}
        database = unit_rows(database, "the originals and distractors")
        results = {}
        for block, rows in features.items():
            order = descending(unit_rows(rows, block) @ database.T)[:, :_RETRIEVED]
            precisions = [
                average_precision(np.flatnonzero(np.isin(ranking, positives)), len(positives))
                for ranking, positives in zip(order, self.positives[block])
            ]
            results[_name(block)] = 100 * float(np.mean(precisions))
        return results

    def _features(self, model: nn.Layer, images: ImageFiles, title: str) -> np.ndarray:
        """[N, D] float64"""
        side = patch_size_of(model)

        def features(batch: paddle.Tensor) -> paddle.Tensor:
            return copy_features(model, cut_to_patches(batch, side)).astype("float32")

        rows = rows_of_all(features, images, self.batch_size, f"copy detection: {title}", self.num_workers)
        if not np.isfinite(rows).all():
            raise ValueError("features are not finite: the weights are damaged, or of another network")
        return rows.astype(np.float64)


def copy_features(backbone: nn.Layer, images: paddle.Tensor) -> paddle.Tensor:
    """[CLS], if there is one, and the generalised mean of the patches' features: [B, C, H, W] -> [B, 2 D] or [B, D]."""
    if isinstance(backbone, TokenTransformer):
        tokens = backbone.get_intermediate_layers(images, n=1)[0]
        return paddle.concat([tokens[:, 0], generalised_mean(tokens[:, 1:])], axis=1)
    pooled = generalised_mean(patch_features(backbone, images).flatten(1, 2))
    if getattr(backbone, "cls_token", None) is None:
        return pooled
    return paddle.concat([backbone(images), pooled], axis=1)


def generalised_mean(features: paddle.Tensor) -> paddle.Tensor:
    """Fourth root of the mean fourth power (GeM, Radenovic et al. 2018); values from 1e-6. [B, N, D] -> [B, D]"""
    return features.clip(min=1e-6).pow(_GEM_POWER).mean(1).pow(1 / _GEM_POWER)


def learn_whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PCA whitening: `(rows - mean) @ matrix`.

    As in the official code the matrix is that of the second moments, of features whose mean has not been taken off,
    and variances below 1e-5 of the largest count as that much.

    Args:
        features: [N, D].

    Returns:
        mean [D] and matrix [D, D], float64.

    Raises:
        ValueError: all features are 0.
    """
    features = features.astype(np.float64)
    variances, directions = np.linalg.eigh(features.T @ features / len(features))
    if not variances[-1] > 0:
        raise ValueError("whitening: the features of all images are 0")
    variances = np.maximum(variances, variances[-1] * 1e-5)[::-1]
    return features.mean(0), directions[:, ::-1] / np.sqrt(variances)


def _name(block: str) -> str:
    return f"copydays_mAP_{block.replace('/', '_')}"


def _blocks(root: Path) -> dict[str, list[str]]:
    """The files of the originals and of each block of copies that is there."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = {}
    for block in BLOCKS:
        folder = root / block
        if not folder.is_dir():
            continue
        names = sorted(name for name in os.listdir(folder) if name.endswith(".jpg") and not name.startswith("."))
        found[block] = [os.fspath(folder / name) for name in names]
        if not found[block]:
            raise FileNotFoundError(f"{folder} contains no .jpg files")
    if "original" not in found or len(found) < 2:
        missing = "original" if "original" not in found else "strong"
        raise FileNotFoundError(
            f"{root} has no folder {missing}: Copydays has original and strong, jpegqual/{{quality}}, crops/{{share}}"
        )
    return found


def _positives(originals: Sequence[str], block: str, copies: Sequence[str]) -> list[list[int]]:
    """The numbers of each copy's originals."""
    if block != "strong":
        if len(copies) != len(originals):
            raise ValueError(
                f"{os.path.dirname(copies[0])} has {len(copies)} .jpg files, and original has {len(originals)}: each "
                "original must have its copy there, in the same order"
            )
        return [[number] for number in range(len(copies))]
    of_prefix: dict[str, list[int]] = {}
    for number, original in enumerate(originals):
        of_prefix.setdefault(os.path.basename(original)[:_PREFIX], []).append(number)
    for copy in copies:
        if os.path.basename(copy)[:_PREFIX] not in of_prefix:
            raise ValueError(f"{copy} is a copy of nothing: no original's name begins with the same {_PREFIX} letters")
    return [of_prefix[os.path.basename(copy)[:_PREFIX]] for copy in copies]


def _plain_images(folder: str) -> list[str]:
    """The images that lie directly in a folder, sorted."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    extensions = image_extensions()
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    found = [os.fspath(path / name) for name in names if os.path.splitext(name)[1].lower() in extensions]
    if not found:
        raise FileNotFoundError(f"{path} contains no images directly")
    return found
