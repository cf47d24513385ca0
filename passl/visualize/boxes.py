"""Boxes around the parts of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from passl.visualize.attention_image import Prepared


def boxes(mask: np.ndarray, prepared: Prepared) -> list[dict[str, Any]]:
    """A box for each connected part of a mask of patches, the largest part first.

    Patches that touch at a corner only are not connected.

    Args:
        mask: bool [h, w]

    Returns:
        ``box``: [left, top, right, bottom] in pixels of the picture that the network saw; right and bottom are the
        first pixels outside. ``original_box``: the same in pixels of the original image. ``patches``: their number in
        this part, ``share``: of the picture.
    """
    import cv2

    count, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    height, width = prepared.size
    found = []
    for left, top, columns, rows, patches in statistics[1:count].tolist():
        edges = np.array([left, top, left + columns, top + rows], np.float64)
        edges *= np.array([width / mask.shape[1], height / mask.shape[0]] * 2)
        x0, y0 = prepared.to_original(*edges[:2])
        x1, y1 = prepared.to_original(*edges[2:])
        found.append(
            {
                "box": _rounded(edges),
                "original_box": _rounded([x0, y0, x1, y1]),
                "patches": patches,
                "share": round(patches / mask.size, 6),
            }
        )
    # Of equal size: from the top, then from the left.
    return sorted(found, key=lambda one: (-one["patches"], one["box"][1], one["box"][0]))


def _rounded(values: Any) -> list[float]:
    return [int(value) if float(value).is_integer() else round(float(value), 2) for value in values]
