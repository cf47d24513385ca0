"""How well masks follow objects through a video: region similarity J and boundary accuracy F (Perazzi et al. 2016;
Pont-Tuset et al. 2017), as the official davis2017-evaluation computes them.
"""

from __future__ import annotations

import cv2
import numpy as np

_TOLERANCE = 0.008  # between boundaries, as a share of the image's diagonal


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean masks [H, W]; 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of the share of the mask's boundary that is near the truth's, and the other way round.

    Boolean masks [H, W]; 1 if neither has a boundary. Near: a disk of 0.008 of the diagonal, rounded up, reaches.
    """
    found, wanted = boundary(mask), boundary(truth)
    num_found, num_wanted = np.count_nonzero(found), np.count_nonzero(wanted)
    if not num_found or not num_wanted:
        return float(num_found == num_wanted)
    reach = disk(int(np.ceil(_TOLERANCE * np.linalg.norm(mask.shape))))
    precision = np.count_nonzero(found & _dilated(wanted, reach)) / num_found
    recall = np.count_nonzero(wanted & _dilated(found, reach)) / num_wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a boolean mask [H, W] that differ from the one to the right, below, or both."""
    right, below, diagonal = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    diagonal[:-1, :-1] = mask[1:, 1:]
    result = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
    # What lies outside is no background: the last row is compared along itself, and so is the last column.
    result[-1] = mask[-1] ^ right[-1]
    result[:, -1] = mask[:, -1] ^ below[:, -1]
    result[-1, -1] = False
    return result


def disk(radius: int) -> np.ndarray:
    """[2 radius + 1, 2 radius + 1] uint8: 1 where the centre is no further than `radius`."""
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares <= radius**2).astype(np.uint8)


def _dilated(mask: np.ndarray, element: np.ndarray) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), element) > 0


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean; recall: the share above 0.5; decay: mean of the first quarter less that of the last.

    values: [T] one for each frame that is measured, in order; at least one. Neighbouring quarters share a frame.
    """
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    decay = values[ends[0] : ends[1] + 1].mean() - values[ends[3] : ends[4] + 1].mean()
    return float(values.mean()), float((values > 0.5).mean()), float(decay)
