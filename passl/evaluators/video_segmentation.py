"""Video object segmentation on DAVIS 2017, by the official DINO's protocol: nothing is trained."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import cv2
import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from passl import distributed
from passl.data.davis import (
    PALETTE,
    VOID,
    VideoSequence,
    find_sequences,
    frame_size,
    read_frame,
    read_mask,
    resize_mask,
    write_mask,
)
from passl.data.transforms import Normalize, ToTensor
from passl.evaluators.davis_metrics import boundary_accuracy, region_similarity, statistics
from passl.evaluators.evaluator import Evaluator
from passl.evaluators.image_features import cut_to_patches
from passl.evaluators.label_propagation import LabelPropagation, segment
from passl.formats.atomic import replacing
from passl.models.tokens import patch_features, patch_size_of
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")

_MIN_TEMPERATURE = 0.02  # exp(1 / temperature), and sums of it, must fit into float32
MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


@EVALUATORS.register()
class VideoSegmentation(Evaluator):
    """`J&F-Mean`, `J-Mean`, `J-Recall`, `J-Decay` and the same of F, in percent: means over all objects.

    The first frame's mask is carried through each video by the similarity of patches. The masks go to
    `{folder}/{sequence}/{frame}.png`, as palette images that the official davis2017-evaluation reads, and its two
    tables, in shares of 1, to `{folder}/global_results-{split}.csv` and `{folder}/per-sequence_results-{split}.csv`.
    What is held does not grow with the length of a video. Processes share the videos out.

    Args:
        root: folder with `JPEGImages`, `Annotations` and `ImageSets`.
        split: name of the list of sequences in `ImageSets/{year}`.
        image_size: the frames' shorter side, in pixels; the longer one becomes a multiple of 64.
        num_frames: how many of the latest frames a patch asks, besides the first.
        radius: how far away, in patches, those that it asks may be; 0: anywhere.
        topk: how many it asks.
        temperature: of the weights exp(similarity / temperature).
        folder: for the files, inside the run's folder.
    """

    key_metric = MEASURES[0]

    def __init__(
        self,
        root: str,
        split: str = "val",
        image_size: int = 480,
        num_frames: int = 7,
        radius: int = 12,
        topk: int = 5,
        temperature: float = 0.1,
        resolution: str = "480p",
        year: str = "2017",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.228, 0.224, 0.225),  # 0.228: as in the official code, here alone
        folder: str = ".",
    ) -> None:
        if image_size < 64:
            raise ValueError(f"image_size ({image_size}) must be at least 64")
        if num_frames < 0 or radius < 0 or topk < 1 or not temperature >= _MIN_TEMPERATURE:
            raise ValueError(
                f"num_frames ({num_frames}) and radius ({radius}) must be at least 0, topk ({topk}) at least 1 and "
                f"temperature ({temperature}) at least {_MIN_TEMPERATURE}"
            )
        if ".." in Path(folder).parts:
            raise ValueError(f"folder ({folder!r}) must not lead out of the run's folder: without '..', or absolute")
        self.sequences = find_sequences(root, split, resolution, year)
        self.split = split
        self.image_size = image_size
        self.propagation = {"num_frames": num_frames, "radius": radius, "topk": topk, "temperature": temperature}
        self.normalize = Normalize(mean, std)
        self.folder = folder

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        folder = Path(output_dir) / Path(self.folder).expanduser()
        own = self.sequences[distributed.rank() :: distributed.world_size()]
        found: dict[str, list[tuple[float, ...]]] = {}
        hidden = None if distributed.is_main() else True  # None: shown on a terminal only
        with tqdm(total=sum(len(s.frames) for s in own), desc="videos", unit="frame", disable=hidden) as bar:
            for sequence in own:
                bar.set_postfix_str(sequence.name, refresh=False)
                found[sequence.name] = self._measured(model, sequence, folder / sequence.name, bar)
        for others in distributed.gather_objects(found):
            found.update(others)
        objects = {
            f"{sequence.name}_{number}": row
            for sequence in self.sequences
            for number, row in enumerate(found[sequence.name], 1)
        }
        if not objects:
            raise ValueError("no first frame has an object: the masks are empty")
        means = np.mean(list(objects.values()), axis=0)
        totals = dict(zip(MEASURES, ((means[0] + means[3]) / 2, *means)))
        if distributed.is_main():
            _write_table(folder / f"global_results-{self.split}.csv", [MEASURES, totals.values()])
            rows = [(name, row[0], row[3]) for name, row in objects.items()]
            _write_table(folder / f"per-sequence_results-{self.split}.csv", [("Sequence", "J-Mean", "F-Mean"), *rows])
            logger.info("masks and tables of %d videos: %s", len(self.sequences), folder)
        return {name: 100 * float(value) for name, value in totals.items()}

    def _measured(self, model: nn.Layer, sequence: VideoSequence, folder: Path, bar: Any) -> list[tuple[float, ...]]:
        """Writes the masks of a video; mean, recall and decay of J and then of F for each object."""
        measured = dict(list(sequence.masks.items())[1:-1])
        regions: list[list[float]] = []
        boundaries: list[list[float]] = []
        folder.mkdir(parents=True, exist_ok=True)
        first, palette = read_mask(next(iter(sequence.masks.values())))
        num_objects = int(_without_void(first).max())
        for frame, mask in self._masks(model, sequence, first):
            stem = Path(frame).stem
            write_mask(folder / f"{stem}.png", mask, palette or PALETTE)
            if stem in measured:
                truth = _without_void(read_mask(measured[stem])[0])
                _check_size(truth, mask.shape, measured[stem])
                pairs = [(mask == number, truth == number) for number in range(1, num_objects + 1)]
                regions.append([region_similarity(*pair) for pair in pairs])
                boundaries.append([boundary_accuracy(*pair) for pair in pairs])
            bar.update()
        columns = zip(np.array(regions).T, np.array(boundaries).T)
        return [(*statistics(region), *statistics(boundary)) for region, boundary in columns]

    def _masks(self, model: nn.Layer, sequence: VideoSequence, first: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each frame's file and mask, in the frame's own size."""
        propagation: Optional[LabelPropagation] = None
        side = patch_size_of(model)
        for frame in sequence.frames:
            pixels = read_frame(frame)
            _check_size(pixels[..., 0], first.shape, frame, "its sequence's first mask")
            images = cut_to_patches(self._tensor(pixels), side)
            features = patch_features(model, images)[0]
            if not paddle.isfinite(features).all():
                raise ValueError(f"features of {frame} are not finite: the weights are damaged, or of another network")
            if propagation is None:
                grid = features.shape[:2]
                labels = paddle.to_tensor(_one_hot(resize_mask(_without_void(first), *grid)))
                propagation = LabelPropagation(features, labels, **self.propagation)
                yield frame, first
                continue
            small = segment(propagation.step(features), *images.shape[-2:])
            yield frame, resize_mask(small, *pixels.shape[:2])

    def _tensor(self, pixels: np.ndarray) -> paddle.Tensor:
        """[H, W, 3] uint8 -> [1, 3, h, w] float32"""
        height, width = frame_size(*pixels.shape[:2], self.image_size)
        resized = cv2.resize(pixels, (width, height))
        return paddle.to_tensor(self.normalize(ToTensor()(resized))[None].astype(np.float32))


def _without_void(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == VOID, np.uint8(0), mask)


def _one_hot(numbers: np.ndarray) -> np.ndarray:
    """[h, w] -> [h, w, largest number + 1] float32"""
    return np.eye(int(numbers.max()) + 1, dtype=np.float32)[numbers]


def _check_size(found: np.ndarray, shape: tuple[int, ...], path: str, other: str = "its frame") -> None:
    if found.shape != tuple(shape):
        (height, width), (rows, columns) = shape, found.shape
        raise ValueError(f"{path} has {columns} x {rows} pixels, and {other} {width} x {height}")


def _write_table(path: Path, rows: Sequence[Any]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([f"{value:.3f}" if isinstance(value, float) else value for value in row])
    with replacing(path) as file:
        file.write(text.getvalue().encode())
