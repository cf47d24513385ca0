"""Features of many images as points of a map."""

from __future__ import annotations

import warnings
from typing import Optional

import numpy as np

from passl.exported import require
from passl.visualize.principal import components_of

METHODS = ("tsne", "umap", "pca")
_PERPLEXITY = 30.0  # of t-SNE, where there are images enough
_NEIGHBOURS = 15  # of UMAP
_WIDTH = 50  # t-SNE sees as many principal components (van der Maaten & Hinton 2008)
_FEWEST = 4  # fewer points lie in a plane anyway


def project(
    features: np.ndarray, method: str = "tsne", seed: int = 0, perplexity: Optional[float] = None
) -> np.ndarray:
    """A point for each row: [N, D] -> [N, 2] float32, the same for equal arguments.

    Up to three rows lie in a plane, and equal rows in a point: those are shown as they are, by any method.

    Args:
        method: "tsne" (van der Maaten & Hinton 2008), "umap" (McInnes et al. 2018) or "pca". All start from the
            principal components, so that large distances mean something too.
        seed: of the random numbers of t-SNE and UMAP.
        perplexity: about how many neighbours a row has for t-SNE; less than N. By default 30, or a third of N - 1.

    Raises:
        ValueError: the features are no table of finite numbers, or an argument is not what it must be.
        ExportError: scikit-learn or umap-learn is not installed.
    """
    features = _checked(features)
    if method not in METHODS:
        raise ValueError(f"method ({method!r}) must be one of {', '.join(METHODS)}")
    count = len(features)
    if perplexity is not None:
        if method != "tsne":
            raise ValueError(f"perplexity is of tsne, not of {method}")
        if not 0 < perplexity < max(count, 1):
            raise ValueError(f"perplexity ({perplexity:g}) must be greater than 0 and less than the {count} images")
    require_method(method)
    if not count:
        return np.zeros((0, 2), np.float32)
    largest = np.abs(features).max()
    if not 1e-15 < largest < 1e15:
        features = features / (largest or 1.0)  # their squares would be none
    components = components_of(features, 2)
    plane = components.scores(features)
    if method == "pca" or count < _FEWEST or not components.variances[0]:
        return plane.astype(np.float32)
    start = plane / plane[:, 0].std()
    if not components.variances[1]:
        # From a line neither method finds the second dimension, and UMAP divides by its spread.
        start[:, 1] = np.random.default_rng(seed).normal(size=count)
    run = _tsne if method == "tsne" else _umap
    with _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        points = run(features, start, seed, perplexity)
    return np.ascontiguousarray(points, np.float32)


def require_method(method: str) -> None:
    """Raises ExportError if the library for ``method`` is not installed."""
    if method != "pca":
        require({"tsne": "sklearn", "umap": "umap"}[method], "viz")


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise ValueError(f"features must be numbers [N, D], and these are {features.dtype} {list(features.shape)}")
    if not features.shape[1]:
        raise ValueError("features must have at least one column")
    features = features.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the features of {len(bad)} of {len(features)} images are not finite (the first: row {bad[0]}): the "
            "weights are damaged, or of another network"
        )
    return features


def _one_thread() -> object:
    """Sums of several threads come in any order, and t-SNE makes much of a last digit. Besides, its threads wait for
    each other with all their might: on cores that others use too, two took several times as long as one.
    """
    return require("threadpoolctl", "viz").threadpool_limits(1)


def _tsne(features: np.ndarray, start: np.ndarray, seed: int, perplexity: Optional[float]) -> np.ndarray:
    manifold = require("sklearn.manifold", "viz")
    if perplexity is None:
        perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    if features.shape[1] > _WIDTH:
        features = components_of(features, _WIDTH).scores(features)
    # A start of its own: that of the library divides by a spread that may be 0.
    start = (start * 1e-4).astype(np.float32)
    mapper = manifold.TSNE(perplexity=perplexity, init=start, random_state=seed)
    return mapper.fit_transform(features / features.std())


def _umap(features: np.ndarray, start: np.ndarray, seed: int, perplexity: Optional[float]) -> np.ndarray:
    umap = require("umap", "viz")
    neighbours = min(_NEIGHBOURS, len(features) - 1)
    mapper = umap.UMAP(n_neighbors=neighbours, init=(start * 5).astype(np.float32), random_state=seed, n_jobs=1)
    return mapper.fit_transform((features / features.std()).astype(np.float32))
