"""From large images to files of patch features, with a pre-trained transformer of patches."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Optional, Union

import numpy as np
import paddle
from paddle import nn
from PIL import Image
from tqdm import tqdm

from passl import distributed
from passl.data.arrays import to_tensor
from passl.data.feature_files import FORMATS, read_features, write_features
from passl.data.image_io import UnreadableImageError
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalize
from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import Evaluator
from passl.evaluators.names import output_names, relative_names
from passl.evaluators.region_index import Region, RegionIndex
from passl.formats.atomic import replacing
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")

_SETTINGS = "extraction.json"


@EVALUATORS.register()
class RegionExtraction(Evaluator):
    """[CLS] features of the patches of large images: for each image a file `[rows * columns, D]`, float32, row by row.

    The files are what RegionFeatures reads. Each has the path of its image in the data set, and `index.csv` lists them.
    Each is written whole or not at all; those that are there are skipped, so that a stopped extraction goes on. Images
    that cannot be read are reported and left out. A process, of which each has its share, holds one image, and
    `num_workers` that are decoded ahead.

    Args:
        dataset: images; its transform is not used.
        patch_size: side of a patch, in pixels of the image.
        remainder: what happens to images whose sides are no multiples of it: they are refused, cut at right and bottom
            (crop), or filled up there with white (pad).
        output: format of the files.
        folder: for the files, inside the run's folder unless it is an absolute path.
        batch_size: patches.
        num_workers: threads that decode.
        mean, std: of the channels, those that the network was trained with.
        max_pixels: Pillow warns of larger images and refuses those with more than twice as many; by default its own
            limit, 89 million, which is 9459 x 9459.
    """

    key_metric = "regions"

    def __init__(
        self,
        dataset: Any,
        patch_size: int = 256,
        remainder: Literal["refuse", "crop", "pad"] = "refuse",
        output: Literal["npy", "npz", "pt"] = "npy",
        folder: str = "features",
        batch_size: int = 64,
        num_workers: int = 1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_pixels: Optional[int] = None,
    ) -> None:
        check_batches(batch_size, num_workers)
        for name, value in (("patch_size", patch_size), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if remainder not in ("refuse", "crop", "pad") or f".{output}" not in FORMATS:
            raise ValueError(
                f"remainder ({remainder!r}) must be refuse, crop or pad, and output ({output!r}) npy, npz or pt"
            )
        if ".." in Path(folder).parts:
            raise ValueError(f"folder ({folder!r}) must not lead out of the run's folder: without '..', or absolute")
        self.regions = relative_names(dataset)
        self.files = output_names(self.regions, f".{output}")
        self.dataset = dataset
        self.patch_size = patch_size
        self.remainder = remainder
        self.folder = folder
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.normalize = Normalize(mean, std)
        self.max_pixels = max_pixels
        self.settings = {
            "patch_size": patch_size,
            "remainder": remainder,
            "output": output,
            "mean": list(mean),
            "std": list(std),
        }

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        """How many regions have files now, their patches, and how many of the regions were there before or left out.

        Raises:
            ValueError: the folder has features of other weights or settings, no image can be read, or features are not
                finite.
        """
        folder = Path(output_dir) / Path(self.folder).expanduser()
        _claim(folder, {**self.settings, "weights": _weights_checksum(model)})
        index = RegionIndex(folder)
        todo = range(distributed.rank(), len(self.files), distributed.world_size())
        kept = [i for i in todo if index.has(self.files[i])]
        todo = sorted(set(todo) - set(kept))
        written, left_out = self._extract(model, folder, index, todo)
        counts = [len(kept), written, len(left_out)]
        shared = distributed.gather_objects((counts, left_out))
        for _, others in shared[1:]:
            _report(others)
        known = index.merge(self.files)
        skipped, written, unreadable = np.sum([counts for counts, _ in shared], axis=0).tolist()
        if not known:
            raise ValueError(f"none of the {len(self.files)} regions can be used: {'; '.join(left_out[:1])}")
        logger.info(
            "%d regions written, %d were there, %d left out; %s", written, skipped, unreadable, folder / "index.csv"
        )
        return {
            "regions": float(skipped + written),
            "patches": float(sum(region.rows * region.columns for region in known)),
            "regions_skipped": float(skipped),
            "regions_left_out": float(unreadable),
        }

    def _extract(self, model: nn.Layer, folder: Path, index: RegionIndex, todo: Sequence[int]) -> tuple[int, list[str]]:
        """Write the files of regions `todo` -> how many, and what is wrong with the others."""
        left_out: list[str] = []
        started, patches = time.perf_counter(), 0
        hidden = None if distributed.is_main() else True  # None: shown on a terminal only
        with index.appending() as note, _pillow_limit(self.max_pixels):
            bar = tqdm(total=len(todo), desc="regions", unit="region", disable=hidden)
            for number, pixels in self._decoded(todo):
                bar.update()
                if isinstance(pixels, UnreadableImageError):
                    left_out.append(str(pixels))
                    _report(left_out[-1:])
                    continue
                rows, columns = (side // self.patch_size for side in pixels.shape[:2])
                target = folder / self.files[number]
                if not _is_whole(target, rows * columns):  # a crash may have come between the file and its note
                    features = self._features(model, pixels)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_features(target, features)
                    patches += len(features)
                    bar.set_postfix_str(f"{patches / (time.perf_counter() - started):.0f} patches/s", refresh=False)
                note(Region(self.files[number], self.regions[number], rows, columns, self._label(number)))
            bar.close()
        return len(todo) - len(left_out), left_out

    def _decoded(self, todo: Iterable[int]) -> Iterator[tuple[int, Union[np.ndarray, UnreadableImageError]]]:
        """The pixels of regions, in order, decoded by threads that are `num_workers` regions ahead."""
        if not self.num_workers:
            yield from ((number, self._pixels(number)) for number in todo)
            return
        with ThreadPoolExecutor(self.num_workers) as pool:
            ahead: deque = deque()
            for number in todo:
                ahead.append((number, pool.submit(self._pixels, number)))
                if len(ahead) > self.num_workers:
                    first, pixels = ahead.popleft()
                    yield first, pixels.result()
            for number, pixels in ahead:
                yield number, pixels.result()

    def _pixels(self, number: int) -> Union[np.ndarray, UnreadableImageError]:
        """[H, W, C], with sides that patches fill; the error, where that is not possible."""
        try:
            pixels = np.asarray(self.dataset.load(number))
            return self._fitted(pixels, self.dataset.describe(number))
        except UnreadableImageError as error:
            return error

    def _fitted(self, pixels: np.ndarray, name: str) -> np.ndarray:
        height, width = pixels.shape[:2]
        size = self.patch_size
        over = height % size, width % size
        if self.remainder == "pad" and any(over):
            white = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1.0
            return np.pad(pixels, [(0, -height % size), (0, -width % size), (0, 0)], constant_values=white)
        if min(height, width) < size:
            raise UnreadableImageError(name, f"{height} x {width} pixels are less than a patch ({size})")
        if self.remainder == "refuse" and any(over):
            reason = f"height and width ({height} x {width}) must be multiples of patch_size ({size})"
            raise UnreadableImageError(name, f"{reason}; or set remainder: crop, or pad")
        return pixels[: height - over[0], : width - over[1]]

    def _features(self, model: nn.Layer, pixels: np.ndarray) -> np.ndarray:
        """[rows * patch_size, columns * patch_size, C] -> [rows * columns, D]"""
        size = self.patch_size
        rows, columns = (side // size for side in pixels.shape[:2])
        cells = [divmod(cell, columns) for cell in range(rows * columns)]
        parts = []
        for start in range(0, len(cells), self.batch_size):
            batch = cells[start : start + self.batch_size]
            patches = [to_tensor(pixels[r * size : (r + 1) * size, c * size : (c + 1) * size]) for r, c in batch]
            images = paddle.to_tensor(self.normalize(np.stack(patches)))
            parts.append(model(images).astype("float32").numpy())
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise ValueError("features are not finite: the weights are damaged, or of another network")
        return features

    def _label(self, number: int) -> str:
        if self.dataset.labels is None:
            return ""
        label = int(self.dataset.labels[number])
        return self.dataset.class_names[label] if self.dataset.class_names else str(label)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make `folder` that of features with these settings.

    Raises:
        ValueError: it has features of others.
    """
    path = folder / _SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    other = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
    distributed.barrier()  # nobody writes before all have looked
    if other:
        raise ValueError(
            f"{folder} holds features that were made otherwise ({', '.join(other)}): give another folder or "
            "output_dir, or remove it"
        )
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
    distributed.barrier()


def _is_whole(path: Path, count: int) -> bool:
    if not path.is_file():
        return False
    try:
        features = read_features(path)
    except UnreadableImageError:
        return False
    return features.ndim == 2 and len(features) == count


def _report(problems: Iterable[str]) -> None:
    for problem in problems:
        logger.warning("region left out: %s", problem)


@contextlib.contextmanager
def _pillow_limit(pixels: Optional[int]) -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = before if pixels is None else pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _weights_checksum(layer: nn.Layer) -> int:
    """A number that tells whether results of two runs are of the same weights."""
    value = 0
    for name, tensor in sorted(layer.state_dict().items()):
        value = zlib.crc32(np.ascontiguousarray(tensor.numpy()), zlib.crc32(name.encode(), value))
    return value
