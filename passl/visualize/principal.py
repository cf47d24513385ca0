"""Principal components whose signs and order do not depend on the machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Variance below this share of the mean square is the rounding of float32, not a direction.
_NOISE = 1e-11
# Loadings this close to the largest count as equally large: rounding shall not choose among them.
_TIE = 1e-4


class NotFiniteError(ValueError):
    """Features that hold NaN or infinity."""


@dataclass
class Components:
    """The main directions of a set of rows.

    Attributes:
        mean: [D] of the rows.
        directions: [K, D], orthonormal, by falling variance; in each the largest of the loadings is positive (of
            equally large ones the first). All zero where there are fewer than K directions.
        variances: [K] of the rows along them.
    """

    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Coordinates of rows [N, D] along the directions: [N, K] float64"""
        return (np.asarray(rows, np.float64) - self.mean) @ self.directions.T


class Moments:
    """Count, mean and scatter matrix of rows that come in parts: memory [D, D] float64, however many they are."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def add(self, rows: np.ndarray) -> None:
        """rows: [N, D], any N

        Raises:
            NotFiniteError: a value is not finite.
        """
        rows = np.asarray(rows, np.float64)
        if not np.isfinite(rows).all():
            raise NotFiniteError("features are not finite: the weights are damaged, or of another network")
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        centred = rows - mean
        if not self.count:
            self._mean, self._scatter = mean, centred.T @ centred
        else:
            # Chan et al. 1983: exact where squares minus a squared mean would cancel.
            shift = mean - self._mean
            weight = len(rows) / (self.count + len(rows))
            self._scatter += centred.T @ centred + np.outer(shift, shift) * self.count * weight
            self._mean = self._mean + shift * weight
        self.count += len(rows)

    def components(self, number: int) -> Components:
        """The first ``number`` directions.

        Raises:
            ValueError: no rows were added.
        """
        if not self.count:
            raise ValueError("no features: there are no components of nothing")
        values, vectors = np.linalg.eigh(self._scatter / self.count)
        return _chosen(self._mean, values[::-1], vectors.T[::-1], number)


def components_of(rows: np.ndarray, number: int) -> Components:
    """The first ``number`` directions of rows [N, D], N >= 1: by the smaller one of their two products.

    Raises:
        ValueError: there are no rows.
        NotFiniteError: a value is not finite.
    """
    rows = np.asarray(rows, np.float64)
    count, width = rows.shape
    if count >= width or count == 0:
        moments = Moments()
        moments.add(rows)
        return moments.components(number)
    if not np.isfinite(rows).all():
        raise NotFiniteError("features are not finite: the weights are damaged, or of another network")
    mean = rows.mean(axis=0)
    centred = rows - mean
    values, vectors = np.linalg.eigh(centred @ centred.T / count)
    directions = vectors.T[::-1][:number] @ centred
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    return _chosen(mean, values[::-1], directions / np.where(lengths > 0, lengths, 1), number)


def _chosen(mean: np.ndarray, values: np.ndarray, directions: np.ndarray, number: int) -> Components:
    """The first ones that are more than rounding, with their signs; zeros behind them."""
    scale = max(float(values[0]), float(mean @ mean))
    kept = Components(mean, np.zeros((number, len(mean))), np.zeros(number))
    for index in range(min(number, len(values), len(directions))):
        if values[index] <= _NOISE * scale:
            break
        loadings = np.abs(directions[index])
        leading = directions[index][np.argmax(loadings >= (1 - _TIE) * loadings.max())]
        kept.directions[index] = directions[index] * (1 if leading > 0 else -1)
        kept.variances[index] = values[index]
    return kept
