"""Image retrieval on revisited Oxford and Paris, by the official DINO's protocol."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from passl.data.revisited import Query, RetrievalImages, read_ground_truth
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Compose, Normalize, ToTensor
from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import Evaluator
from passl.evaluators.image_features import cut_to_patches, rows_of_all, unit_rows
from passl.evaluators.ranking import descending, mean_of_known, revisited_scores
from passl.models.tokens import patch_size_of
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")

KAPPAS = (1, 5, 10)
_SCALES = (1.0, 2**-0.5, 0.5)


@EVALUATORS.register()
class ImageRetrieval(Evaluator):
    """`mAP_medium`, `mAP_hard`, and `mP@1_medium` and so on (1, 5, 10), in percent, on revisited Oxford or Paris.

    Medium: easy and hard images are right; hard: hard ones are, and easy ones are junk. Queries without right images
    are left out of the means. Any backbone: what counts is what it returns for an image.

    Args:
        root: folder with `{benchmark}/gnd_{benchmark}.pkl` and `{benchmark}/jpg/*.jpg`.
        benchmark: roxford5k, rparis6k, or a set of your own of the same form.
        image_size: images are reduced to fit into a square of so many pixels; smaller ones stay as they are. null: all.
        multiscale: mean of the features at three scales: 1, 1/sqrt(2) and 1/2.
        crop_queries: cut queries to their boxes (bbx), as the benchmark itself asks; the official DINO does not.
        prefix: before the names of the results, for two benchmarks in one run.
    """

    def __init__(
        self,
        root: str,
        benchmark: str = "roxford5k",
        image_size: Optional[int] = 224,
        multiscale: bool = False,
        crop_queries: bool = False,
        num_workers: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        prefix: str = "",
    ) -> None:
        check_batches(1, num_workers)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size ({image_size}) must be at least 1, or null for images as they are")
        self.truth = read_ground_truth(root, benchmark)
        transform = Compose([ToTensor(), Normalize(mean, std)])
        boxes = _boxes(self.truth.queries) if crop_queries else None
        self.database = RetrievalImages(self.truth.images, transform, image_size)
        self.queries = RetrievalImages(self.truth.query_images, transform, image_size, boxes)
        self.multiscale = multiscale
        self.num_workers = num_workers
        self.prefix = prefix
        self.key_metric = f"{prefix}mAP_medium"

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        database = self._features(model, self.database, "retrieval: database")
        queries = self._features(model, self.queries, "retrieval: queries")
        order = descending(queries @ database.T)
        results = {}
        for protocol in ("medium", "hard"):
            scores = 100 * mean_of_known(_scores(order, self.truth.queries, protocol))
            if np.isnan(scores[0]):
                logger.warning("no query has right images by the %s protocol: its numbers are NaN", protocol)
            names = ("mAP", *(f"mP@{kappa}" for kappa in KAPPAS))
            results.update({f"{self.prefix}{name}_{protocol}": float(value) for name, value in zip(names, scores)})
        return results

    def _features(self, model: nn.Layer, images: RetrievalImages, title: str) -> np.ndarray:
        """[N, D], rows of length 1"""
        side = patch_size_of(model)
        images.least_side = 2 * side if self.multiscale else side

        def features(image: paddle.Tensor) -> paddle.Tensor:
            scales = _SCALES if self.multiscale else (1.0,)
            total = sum(model(cut_to_patches(_scaled(image, scale), side)).astype("float32") for scale in scales)
            return total / len(scales)

        # Images differ in size, so that they come one by one.
        rows = rows_of_all(features, images, 1, title, self.num_workers)
        if rows.ndim != 2:
            raise ValueError(f"the backbone returned {list(rows.shape[1:])} for an image: retrieval needs one row each")
        return unit_rows(rows, title.rpartition(" ")[2])


def _boxes(queries: Sequence[Query]) -> list[tuple[float, float, float, float]]:
    boxes = [query.box for query in queries]
    if None in boxes:
        raise ValueError(f"crop_queries needs a box of each query: gnd[{boxes.index(None)}] has no 'bbx'")
    return boxes


def _scores(order: np.ndarray, queries: Sequence[Query], protocol: str) -> np.ndarray:
    """[queries, 1 + KAPPAS]: average precision and precisions at k, 0..1 or NaN."""
    rows = []
    for ranking, query in zip(order, queries):
        if protocol == "medium":
            positives, junk = np.concatenate([query.easy, query.hard]), query.junk
        else:
            positives, junk = query.hard, np.concatenate([query.junk, query.easy])
        precision, at_kappas = revisited_scores(ranking, positives, junk, KAPPAS)
        rows.append([precision, *at_kappas])
    return np.array(rows)


def _scaled(image: paddle.Tensor, scale: float) -> paddle.Tensor:
    if scale == 1:
        return image
    return F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
