"""What a run's report shows of its network: attention maps of a few images, and a map of the features of many."""

from __future__ import annotations

import inspect
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from PIL import Image
from tqdm import tqdm

from passl import exported
from passl.config import component_parts
from passl.data.arguments import height_and_width
from passl.data.erasing import RandomErasing
from passl.data.errors import UnreadableImageError
from passl.data.multi_crop import MultiCrop
from passl.data.region_features import RegionMultiCrop
from passl.data.samples import ImageSamples, Samples
from passl.data.transforms import (
    ColorJitter,
    Compose,
    GaussianBlur,
    Normalize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Solarize,
)
from passl.engine import build
from passl.engine.report import ATTENTION, GALLERY, MAP, MAP_PICTURE, NOTES
from passl.engine.settings import ReportSettings
from passl.formats.atomic import replacing
from passl.models import functional
from passl.models.tokens import cls_attention
from passl.registry import DATASETS
from passl.visualize.attention import overview
from passl.visualize.attention_image import denormalized
from passl.visualize.embeddings import project, require_method
from passl.visualize.scatter import scatter_picture
from passl.visualize.scatter_page import scatter_fragment
from passl.visualize.sheet import stacked

logger = logging.getLogger("passl")

_METHODS = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}
_BATCH = 32
_THUMBNAIL = 40  # pixels
_RANDOM = (RandomHorizontalFlip, ColorJitter, RandomGrayscale, GaussianBlur, Solarize, RandomErasing)
_LEAST_GRID = 12  # cells of an attention map's shorter side: coarser ones show little


def dataset_of(config: Mapping[str, Any]) -> Optional[Samples]:
    """The images that a configuration evaluates on, else those it trains on, as evaluation sees them."""
    loading = config.get("DataLoader") or {}
    specs = [((loading.get("Eval") or {}).get("dataset"), "DataLoader.Eval.dataset")]
    for number, evaluator in enumerate(config.get("Evaluators") or []):
        arguments = component_parts(evaluator)[1]
        specs += [(arguments.get(key), f"Evaluators.{number}.{key}") for key in ("val_dataset", "dataset")]
    specs.append(((loading.get("Train") or {}).get("dataset"), "DataLoader.Train.dataset"))
    found = next(((spec, where) for spec, where in specs if spec), None)
    if found is None:
        return None
    dataset = build.component(found[0], DATASETS, found[1])
    steps = component_parts(found[0])[1].get("transform")
    _leave_augmentation_out(dataset, steps if isinstance(steps, list) else [steps] if steps else [])
    return dataset


def _leave_augmentation_out(dataset: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    """steps: of the transform, as the configuration has them."""
    names = [component_parts(step)[0] for step in steps]
    if MultiCrop.__name__ in names:
        views = inspect.signature(MultiCrop).bind(**component_parts(steps[names.index(MultiCrop.__name__)])[1])
        views.apply_defaults()
        sides = height_and_width(views.arguments["global_crops_size"])
        statistics = views.arguments["mean"], views.arguments["std"]
        dataset.transform = exported.transform(exported.standard_preprocessing(*sides, *statistics))
    elif RegionMultiCrop.__name__ in names:
        dataset.transform = None
    elif not names and isinstance(dataset, ImageSamples):
        dataset.transform = exported.transform(exported.standard_preprocessing(224, 224))
    elif isinstance(dataset.transform, Compose):
        kept = []
        for step in dataset.transform.transforms:
            if isinstance(step, RandomResizedCrop):
                height, width = step.size
                kept += exported.transform(exported.standard_preprocessing(height, width)[:-2]).transforms
            elif not isinstance(step, _RANDOM):
                kept.append(step)
        dataset.transform = Compose(kept)


def _best_method() -> str:
    """t-SNE where it is installed."""
    try:
        require_method("tsne")
    except exported.ExportError:
        return "pca"
    return "tsne"


class Gallery:
    """Pictures for the report of a run, in its folder `report`; what could not be drawn is said there.

    Args:
        folder: of the run.
        writer: VisualDL's, which gets the pictures and features too; None: nowhere.
    """

    def __init__(self, settings: ReportSettings, folder: Path, writer: Any = None) -> None:
        self.settings = settings
        self.folder = folder / GALLERY
        self.writer = writer
        self.notes: dict[str, Any] = {"seconds": {}}

    @paddle.no_grad()
    def make(self, backbone: nn.Layer, config: Mapping[str, Any], step: int) -> None:
        """Draw all of it; the backbone is in eval mode afterwards.

        Args:
            config: of the run, for its images.
            step: of the run, for VisualDL.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (ATTENTION, MAP, MAP_PICTURE, NOTES):
            (self.folder / old).unlink(missing_ok=True)
        backbone.eval()
        dataset, problem = None, "the configuration names no images (DataLoader, or a data set of an evaluator)"
        try:
            dataset = dataset_of(config)
        except (ValueError, OSError) as error:
            problem = str(error)
        for name, draw in (("attention", self._attention), ("map", self._map)):
            started = time.perf_counter()
            try:
                if dataset is None:
                    raise ValueError(problem)
                draw(backbone, dataset, step)
            except Exception as error:  # such a backbone, or such images; the other parts of the page do not need it
                self.notes[f"no_{name}"] = f"none: {error}"
                expected = isinstance(error, (ValueError, OSError))
                logger.log(
                    logging.INFO if expected else logging.ERROR, "report: no %s (%s)", name, error,
                    exc_info=None if expected else error,
                )  # fmt: skip
            self.notes["seconds"][f"report: {name}"] = time.perf_counter() - started
        with replacing(self.folder / NOTES) as file:
            file.write(json.dumps(self.notes, indent=2).encode())

    def _attention(self, backbone: nn.Layer, dataset: Samples, step: int) -> None:
        pictures = []
        for _, array in _images(dataset, self.settings.images, "report: images"):
            image = paddle.to_tensor(array[None])
            maps = cls_attention(backbone, image)
            enlarged = math.ceil(_LEAST_GRID / min(maps.shape[2:]))
            if enlarged > 1:
                image = F.interpolate(image, scale_factor=enlarged, mode="bicubic")
                maps = cls_attention(backbone, image)
            pictures.append(overview(_visible(image[0].numpy(), dataset), maps[0].astype("float32").numpy()))
        picture = stacked(pictures)
        picture.save(self.folder / ATTENTION)
        self.notes["attention"] = (
            "What the [CLS] token of the last block attends to: the image, the mean over the heads, and each head."
        )
        self._show("report/attention", picture, step)

    def _map(self, backbone: nn.Layer, dataset: Samples, step: int) -> None:
        indices: list[int] = []
        features, thumbnails, batch = [], [], []
        count = min(self.settings.points, len(dataset))
        for index, image in _images(dataset, count, "report: features"):
            indices.append(index)
            thumbnails.append(_thumbnail(_visible(image, dataset)))
            batch.append(image)
            if len(batch) == _BATCH:
                features.append(_features(backbone, batch))
                batch = []
        rows = np.concatenate([*features, _features(backbone, batch)] if batch else features)
        method = _best_method() if self.settings.method == "auto" else self.settings.method
        points = project(rows, method)
        labels, class_names = _classes(dataset, indices)
        names = [dataset.describe(index) for index in indices]
        fragment = scatter_fragment(points, labels, class_names, names, thumbnails)
        with replacing(self.folder / MAP) as file:
            file.write(fragment.encode())
        picture = scatter_picture(points, labels, class_names, thumbnails)
        picture.save(self.folder / MAP_PICTURE)
        self.notes["map"] = (
            f"{len(rows)} images by their features of {rows.shape[1]} numbers at length 1, laid out by "
            f"{_METHODS[method]}: neighbours look alike to the network."
        )
        self._show("report/embeddings", picture, step)
        if self.writer is not None:
            kinds = names if labels is None else [class_names[label] if label >= 0 else "no class" for label in labels]
            self.writer.add_embeddings("report/features", mat=rows.tolist(), metadata=kinds)

    def _show(self, tag: str, picture: Image.Image, step: int) -> None:
        if self.writer is not None:
            self.writer.add_image(tag, np.asarray(picture.convert("RGB")), step)


def _features(backbone: nn.Layer, images: Sequence[np.ndarray]) -> np.ndarray:
    return functional.normalize(backbone(paddle.to_tensor(np.stack(images))).astype("float32")).numpy()


def _classes(dataset: Samples, indices: Sequence[int]) -> tuple[Optional[np.ndarray], list[str]]:
    """Numbers of the class names (-1: none) of some samples, and the names: the labels themselves where there are no
    others.
    """
    if dataset.labels is None:
        return None, []
    labels = np.asarray(dataset.labels)
    if dataset.class_names:
        return labels[indices], dataset.class_names
    used = np.unique(labels)
    return np.searchsorted(used, labels[indices]), [str(label) for label in used]


def _images(dataset: Samples, count: int, title: str) -> Iterator[tuple[int, np.ndarray]]:
    """``count`` readable images [C, H, W] and their numbers, drawn evenly from all; the same at each call.

    Raises:
        ValueError: there are none, they differ in size, or they are no images.
    """
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    found, shape = 0, ()
    with tqdm(total=min(count, len(order)), desc=title, unit="image", leave=False, disable=None) as bar:
        for index in [*sorted(order[:count]), *order[count:]]:  # the others stand in for unreadable ones
            if found == count:
                return
            try:
                content = dataset.content(index, np.random.default_rng([0, index]))
            except UnreadableImageError as error:
                logger.warning("report: left out: %s", error)
                continue
            image = np.asarray(content.get("image"), np.float32)
            if image.ndim != 3:
                raise ValueError(f"the samples are no images [C, H, W], but have the shape {list(image.shape)}")
            if found and image.shape != shape:
                wanted = "give the data set a transform that makes sizes equal, such as CenterCrop"
                raise ValueError(f"the images differ in size: {wanted}")
            shape, found = image.shape, found + 1
            bar.update()
            yield index, image
    if not found:
        raise ValueError("there are no images that can be read")


def _visible(image: np.ndarray, dataset: Samples) -> np.ndarray:
    """[C, H, W] as it went into the network -> [H, W, 3] of 8 bits."""
    steps = getattr(getattr(dataset, "transform", None), "transforms", [])
    mean, std = next(((step.mean, step.std) for step in steps if isinstance(step, Normalize)), (0.0, 1.0))
    return denormalized(image, mean, std)


def _thumbnail(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture
