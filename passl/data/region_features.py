"""Regions of patch features, for transformers over regions (Chen et al. 2022; clemsgrs/dino)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import numpy as np

from passl.data.datasets import ImageList
from passl.data.feature_files import FORMATS, read_features
from passl.data.file_index import Paths, find_files
from passl.data.image_io import UnreadableImageError
from passl.data.samples import Samples
from passl.data.transforms import Generator, probability
from passl.registry import DATASETS, TRANSFORMS

PathLike = Union[str, os.PathLike]
_MAX_FIRST = 20  # files tried for the shape that all must have


@DATASETS.register()
class RegionFeatures(Samples):
    """Feature files `[n, D]` (`.npy`, `.npz`, `.pt`), one for each region: the features of its n patches, row by row.

    A sample is the grid `[D, rows, columns]` as float32: as `image`, whole, or what `transform` makes of it. All files
    must have one shape.

    Args:
        root: folder of the files, and of folders of them; in sorted order.
        list_file, class_names: instead of all files of `root` those that a list or a csv names, with labels or without,
            as in ImageList. The `index.csv` of RegionExtraction is one.
        class_folders: whether the folders in `root` are classes; by default they are if no file lies in `root` itself.
        grid: `[rows, columns]`, for regions that are not square.
        embed_dim: D; by default that of the first file that can be read.
        key: which array of files that hold several.

    Raises:
        FileNotFoundError: the folder or the list is missing, or holds no feature files.
        ValueError: `class_folders`, and files lie in `root` itself; or a malformed list.
    """

    def __init__(
        self,
        root: Optional[PathLike] = None,
        list_file: Optional[PathLike] = None,
        class_names: Optional[Sequence[str]] = None,
        class_folders: Optional[bool] = None,
        grid: Optional[Sequence[int]] = None,
        embed_dim: Optional[int] = None,
        key: Optional[str] = None,
        transform: Optional[Callable[..., Any]] = None,
        max_bad_samples: int = 10,
    ) -> None:
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid must be [rows, columns], each at least 1, not {list(grid)}")
        if root is None and list_file is None:
            raise ValueError("RegionFeatures needs a root (a folder of feature files), a list_file, or both")
        if list_file is not None:
            if class_folders:
                raise ValueError("class_folders is for a root alone: a list_file has its own labels")
            listed = ImageList(root, list_file, class_names)
            root, paths, labels, class_names = listed.root, listed.paths, listed.labels, listed.class_names
        else:
            if class_names is not None:
                raise ValueError("class_names is for a list_file: without it the folders are the classes")
            root = os.path.expanduser(os.fspath(root))
            paths, labels, class_names = _in_folder(root, class_folders)
        super().__init__(labels, class_names, max_bad_samples)
        self.root = root
        self.paths = paths
        self.grid = None if grid is None else tuple(grid)
        self.key = key
        self.transform = transform
        self._count, self._embed_dim = self._shape_of_first(embed_dim)

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        return self.paths[index]

    def features(self, index: int) -> np.ndarray:
        """The grid `[D, rows, columns]` of region `index`, float32, a view of the file where that is possible. Raises
        UnreadableImageError.
        """
        path = self.paths[index]
        features = read_features(path, self.key)
        rows, columns = _grid_of(path, features, self.grid)
        if features.shape != (self._count or features.shape[0], self._embed_dim or features.shape[1]):
            wanted = [self._count or "patches", self._embed_dim or "width"]
            text = f"features of shape {list(features.shape)}: those of the data set are [{wanted[0]}, {wanted[1]}]"
            raise UnreadableImageError(path, text)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is found below
            features = features.astype(np.float32, copy=False)
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features).all(axis=1)).sum())
            raise UnreadableImageError(path, f"{bad} of {len(features)} rows hold NaN or infinity")
        return features.reshape(rows, columns, -1).transpose(2, 0, 1)

    def content(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The whole grid as `image`, or what the transform returns. Raises UnreadableImageError."""
        grid = self.features(index)
        transformed = np.ascontiguousarray(grid) if self.transform is None else self.transform(grid, rng)
        return dict(transformed) if isinstance(transformed, dict) else {"image": transformed}

    def _shape_of_first(self, embed_dim: Optional[int]) -> tuple[Optional[int], Optional[int]]:
        """n and D of the first file that can be read, None for what none of the first files tells."""
        for path in self.paths[:_MAX_FIRST]:
            try:
                features = read_features(path, self.key)
                _grid_of(path, features, self.grid)
            except UnreadableImageError:
                continue  # reported when it is its turn
            if embed_dim is None or features.shape[1] == embed_dim:
                return features.shape
        return None, embed_dim


@TRANSFORMS.register()
class RegionMultiCrop:
    """The views of clemsgrs/dino of a region: random windows of its grid of features, mirrored or not.

    Nothing is resized: a view has `int(scale * rows)` by `int(scale * columns)` of the features, which is 14 x 14 and 6
    x 6 of 16 x 16.

    Args:
        global_crops_scale, local_crops_scale: share of the region's side that a view covers.
        num_local_crops: may be 0.
    """

    def __init__(
        self,
        global_crops_scale: float = 0.875,
        local_crops_scale: float = 0.375,
        num_local_crops: int = 8,
        flip_prob: float = 0.5,
    ) -> None:
        for name, scale in (("global_crops_scale", global_crops_scale), ("local_crops_scale", local_crops_scale)):
            if not 0 < scale <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {scale!r}")
        if num_local_crops < 0:
            raise ValueError(f"num_local_crops must be at least 0, not {num_local_crops!r}")
        self.global_crops_scale = global_crops_scale
        self.local_crops_scale = local_crops_scale
        self.num_local_crops = num_local_crops
        self.flip_prob = probability(flip_prob, "flip_prob")

    def __call__(self, grid: np.ndarray, rng: Generator) -> dict[str, np.ndarray]:
        """[D, rows, columns] -> `global_crops` [2, D, h, w] and, if any, `local_crops` [n, D, h, w]."""
        if getattr(grid, "ndim", 0) != 3:
            raise ValueError(
                f"RegionMultiCrop takes the grids of RegionFeatures, not {type(grid).__name__}: use MultiCrop"
            )
        views = {"global_crops": self._views(grid, rng, self.global_crops_scale, 2)}
        if self.num_local_crops:
            views["local_crops"] = self._views(grid, rng, self.local_crops_scale, self.num_local_crops)
        return views

    def _views(self, grid: np.ndarray, rng: Generator, scale: float, count: int) -> np.ndarray:
        dim, rows, columns = grid.shape
        height, width = int(scale * rows), int(scale * columns)
        if not height or not width:
            raise ValueError(f"a view of {scale} of a region of {rows} x {columns} patches would be empty")
        views = np.empty((count, dim, height, width), grid.dtype)
        for view in views:
            top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            flip = rng.random() < self.flip_prob
            view[:] = region_view(grid, top, left, height, width, flip)
        return views


def region_view(grid: np.ndarray, top: int, left: int, height: int, width: int, flip: bool) -> np.ndarray:
    """A window of `grid` [D, rows, columns], mirrored left to right or not: [D, height, width], not copied."""
    window = grid[:, top : top + height, left : left + width]
    return window[:, :, ::-1] if flip else window


def _grid_of(path: str, features: np.ndarray, grid: Optional[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns of the patches whose `features` [n, D] these are."""
    if features.ndim != 2 or not features.size:
        raise UnreadableImageError(path, f"features of shape {list(features.shape)}: they must be [patches, width]")
    n = len(features)
    if grid is None:
        side = math.isqrt(n)
        if side * side != n:
            raise UnreadableImageError(path, f"{n} patches are no square: give grid: [rows, columns]")
        return side, side
    if n != math.prod(grid):
        raise UnreadableImageError(path, f"{n} patches, and grid is {grid[0]} x {grid[1]}")
    return grid


def _in_folder(root: str, class_folders: Optional[bool]) -> tuple[Paths, Optional[np.ndarray], list[str]]:
    """Paths of the feature files under `root`, sorted by folder, then by name; labels and classes if it has any."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"there is no folder {root}")
    index = find_files(root, FORMATS)
    if not len(index.names):
        raise FileNotFoundError(f"{root} and its folders contain no feature files ({', '.join(FORMATS)})")
    has_stray = index.counts[0] > 0  # in root itself, the first of the folders
    if class_folders is False or (has_stray and class_folders is None):
        return index.paths(), None, []
    if has_stray:
        raise ValueError(
            f"{root} contains feature files directly (such as {index.names[0]!r}): class_folders must be false"
        )
    class_names, label_of = np.unique([folder.split(os.sep)[0] for folder in index.folders], return_inverse=True)
    used = np.unique(label_of[index.counts > 0])  # a folder without files is no class
    labels = np.searchsorted(used, np.repeat(label_of, index.counts))
    return index.paths(), labels, class_names[used].tolist()
