"""Average precision of ranked images, as the retrieval benchmarks measure it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def average_precision(places: np.ndarray, num_positives: int) -> float:
    """Area under the precision-recall curve by trapezoids (Philbin et al. 2007), 0..1.

    Args:
        places: [n] those of the positives that were found, from 0, ascending.
        num_positives: how many there are to find; at least 1.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (np.asarray(places) + 1)
    return float((before + after).sum() / 2 / num_positives)


def revisited_scores(
    order: np.ndarray, positives: np.ndarray, junk: np.ndarray, kappas: Sequence[int]
) -> tuple[float, np.ndarray]:
    """Average precision and precision at each of `kappas` of one query, 0..1, by the revisited protocol
    (Radenovic et al. 2018): junk is taken out of the ranking; the precision at k counts no further than the last
    positive.

    Args:
        order: [N] numbers of all database images, the most similar first.

    Returns:
        NaN for all if the query has no positives: it is left out of means.
    """
    if not len(positives):
        return np.nan, np.full(len(kappas), np.nan)
    is_junk = np.isin(order, junk)
    places = np.flatnonzero(np.isin(order, positives))
    places = places - (np.cumsum(is_junk) - is_junk)[places]
    last = places.max() + 1
    counted = [min(last, kappa) for kappa in kappas]
    return average_precision(places, len(positives)), np.array([(places < k).sum() / k for k in counted])


def descending(similarity: np.ndarray) -> np.ndarray:
    """Indices [M, N] that sort the rows of `similarity` [M, N], the largest first; equal ones stay in order."""
    return np.argsort(-similarity, axis=1, kind="stable")


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where there is nothing else. [M, ...] -> [...]"""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)
