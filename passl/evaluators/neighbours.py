"""The most similar rows, exactly, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle

_BLOCK = 1 << 14  # training rows at a time: their similarities to a chunk of rows stay in the processor's cache
_CHUNK_ELEMENTS = 1 << 23  # similarities at a time: 32 MB of float32
_MOST_ROWS = 512
_GROUPS = 4  # groups of columns for each neighbour: the bound then lets few others pass


def nearest(train: np.ndarray, rows: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The ``count`` rows of ``train`` with the largest inner products with each of ``rows``, largest first; of equal
    ones the earlier.

    Memory grows neither with the number of ``rows`` nor with that of ``train``.

    Args:
        train: [N, D] float32, finite; count: 1 to N.
        rows: [M, D] float32, finite.

    Yields:
        For each chunk of B rows: the number of its first row, products [B, count] float32, and indices [B, count].
    """
    search = _by_paddle if paddle.get_device().startswith("gpu") else _by_numpy
    block = min(max(_BLOCK, 2 * count), len(train))
    # Beside the block: the neighbours so far and what may replace them, with their indices, to be sorted.
    chunk = min(max(1, _CHUNK_ELEMENTS // (block + 12 * count)), _MOST_ROWS)
    for start in range(0, len(rows), chunk):
        yield (start, *search(train, np.ascontiguousarray(rows[start : start + chunk]), count, block))


def _by_numpy(train: np.ndarray, rows: np.ndarray, count: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    # Products by numpy: on a CPU faster than Paddle's, which first turns the second matrix.
    products = np.empty((0, len(rows)), np.float32)
    values, indices = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
    memory = np.empty(len(rows) * block, np.float32)
    for start in range(0, len(train), block):
        part = train[start : start + block]
        products = np.matmul(rows, part.T, out=memory[: len(rows) * len(part)].reshape(len(rows), len(part)))
        limits = lower_bounds(products, count)
        if values.shape[1] == count:  # the earlier one of equals stays
            limits = np.maximum(limits, np.nextafter(values[:, -1], np.float32(np.inf)))
        passing, columns = np.divmod(np.flatnonzero(products >= limits[:, None]), len(part))
        if len(passing):
            found = products[passing, columns]
            values, indices = _merged(values, indices, passing, found, columns + start, count)
    return values, indices


def lower_bounds(products: np.ndarray, count: int) -> np.ndarray:
    """Of each row [B, W] a number that at least ``count`` of its values reach, or minus infinity.

    The count-th largest of the maxima of groups is one, and cheaper than the count-th largest value.
    """
    rows, width = products.shape
    groups = max(_GROUPS * count, width // 32)
    size = width // groups
    if size < 2:
        if width <= 2 * count:
            return np.full(rows, -np.inf, np.float32)
        return np.partition(products, width - count, axis=1)[:, width - count]
    maxima = products[:, : size * groups].reshape(rows, size, groups).max(axis=1)
    return np.partition(maxima, groups - count, axis=1)[:, groups - count]


def _merged(
    values: np.ndarray, indices: np.ndarray, passing: np.ndarray, found: np.ndarray, columns: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` of each row's ``values`` [B, n], which are sorted, and of what was ``found`` after them.

    passing, columns: row and index of each of ``found``, row by row with indices ascending.
    """
    rows, held = values.shape
    counts = np.bincount(passing, minlength=rows)
    places = held + np.arange(len(passing)) - np.repeat(np.cumsum(counts) - counts, counts)
    wide = held + int(counts.max())
    negatives = np.full((rows, wide), np.inf, np.float32)
    negatives[:, :held] = -values
    negatives[passing, places] = -found
    sources = np.zeros((rows, wide), np.int64)
    sources[:, :held] = indices
    sources[passing, places] = columns
    order = np.argsort(negatives, axis=1, kind="stable")[:, :count]
    return -np.take_along_axis(negatives, order, axis=1), np.take_along_axis(sources, order, axis=1)


def _by_paddle(train: np.ndarray, rows: np.ndarray, count: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The same on the device of Paddle."""
    queries = paddle.to_tensor(rows)
    values, indices = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
    for start in range(0, len(train), block):
        part = paddle.to_tensor(train[start : start + block])
        products = paddle.matmul(queries, part, transpose_y=True)
        largest = min(count, len(part))
        found, columns = (tensor.numpy() for tensor in paddle.topk(products, largest, axis=1))
        both = np.concatenate([values, found], axis=1), np.concatenate([indices, columns + start], axis=1)
        # Of equal ones the earlier: topk has none in a certain order.
        order = np.lexsort((both[1], -both[0]))[:, :count]
        values, indices = (np.take_along_axis(array, order, axis=1) for array in both)
    return values, indices
