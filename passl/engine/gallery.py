"""What a run's report shows of its network: attention maps of a few images, and a map of the features of many."""

from __future__ import annotations

import inspect
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
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
from passl.data.errors import UnreadableImageError
from passl.data.multi_crop import MultiCrop
from passl.data.samples import ImageSamples, Samples
from passl.data.transforms import Normalize
from passl.engine import build
from passl.engine.report import ATTENTION, GALLERY, MAP, MAP_PICTURE, NOTES
from passl.engine.settings import ReportSettings
from passl.formats.atomic import replacing
from passl.models import functional
from passl.models.tokens import cls_attention
from passl.registry import DATASETS
from passl.visualize.attention import overview
from passl.visualize.embeddings import project
from passl.visualize.scatter import scatter_picture
from passl.visualize.scatter_page import scatter_fragment
from passl.visualize.sheet import stacked

logger = logging.getLogger("passl")

_METHODS = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}
_BATCH = 32
_THUMBNAIL = 40  # pixels
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
    if steps is None and isinstance(dataset, ImageSamples):
        dataset.transform = exported.transform(exported.standard_preprocessing(224, 224))
    if isinstance(steps, Mapping) and component_parts(steps)[0] == MultiCrop.__name__:
        views = inspect.signature(MultiCrop).bind(**component_parts(steps)[1])
        views.apply_defaults()
        sides = height_and_width(views.arguments["global_crops_size"])
        statistics = views.arguments["mean"], views.arguments["std"]
        dataset.transform = exported.transform(exported.standard_preprocessing(*sides, *statistics))
    return dataset


@dataclass
class _Shown:
    """Images as the network sees them [N, C, H, W], and whose they are."""

    images: np.ndarray
    indices: list[int]


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
    def make(self, backbone: nn.Layer, dataset: Samples, step: int) -> None:
        """Draw all of it; the backbone is in eval mode afterwards. step: of the run, for VisualDL."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (ATTENTION, MAP, MAP_PICTURE, NOTES):
            (self.folder / old).unlink(missing_ok=True)
        backbone.eval()
        for name, draw in (("attention", self._attention), ("map", self._map)):
            started = time.perf_counter()
            try:
                draw(backbone, dataset, step)
            except ValueError as error:  # a backbone, or images, of which there is no such picture
                self.notes[f"no_{name}"] = f"none: {error}"
                logger.info("report: no %s (%s)", name, error)
            self.notes["seconds"][f"report: {name}"] = time.perf_counter() - started
        with replacing(self.folder / NOTES) as file:
            file.write(json.dumps(self.notes, indent=2).encode())

    def _attention(self, backbone: nn.Layer, dataset: Samples, step: int) -> None:
        shown = _load(dataset, self.settings.images, "report: images")
        pictures = []
        for tensor in shown.images:
            image = paddle.to_tensor(tensor[None])
            maps = cls_attention(backbone, image)
            enlarged = math.ceil(_LEAST_GRID / min(maps.shape[2:]))
            if enlarged > 1:
                image = F.interpolate(image, scale_factor=enlarged, mode="bicubic")
                maps = cls_attention(backbone, image)
            pictures.append(overview(_visible(image[0].numpy(), dataset), maps[0].numpy()))
        picture = stacked(pictures)
        picture.save(self.folder / ATTENTION)
        self.notes["attention"] = (
            "What the [CLS] token of the last block attends to: the image, the mean over the heads, and each head."
        )
        self._show("report/attention", picture, step)

    def _map(self, backbone: nn.Layer, dataset: Samples, step: int) -> None:
        shown = _load(dataset, self.settings.points, "report: images for the map")
        features = []
        batches = range(0, len(shown.indices), _BATCH)
        for start in tqdm(batches, desc="report: features", unit="batch", leave=False, disable=None):
            images = paddle.to_tensor(shown.images[start : start + _BATCH])
            features.append(functional.normalize(backbone(images).astype("float32")).numpy())
        rows = np.concatenate(features)
        method = self.settings.method
        if method == "auto":
            method = "tsne" if find_spec("sklearn") else "pca"
        points = project(rows, method)
        labels = None if dataset.labels is None else np.asarray(dataset.labels)[shown.indices]
        names = [dataset.describe(index) for index in shown.indices]
        thumbnails = [_thumbnail(_visible(image, dataset)) for image in shown.images]
        fragment = scatter_fragment(points, labels, dataset.class_names, names, thumbnails)
        with replacing(self.folder / MAP) as file:
            file.write(fragment.encode())
        picture = scatter_picture(points, labels, dataset.class_names, thumbnails)
        picture.save(self.folder / MAP_PICTURE)
        self.notes["map"] = (
            f"{len(rows)} images by their features of {rows.shape[1]} numbers at length 1, laid out by "
            f"{_METHODS[method]}: neighbours look alike to the network."
        )
        self._show("report/embeddings", picture, step)
        if self.writer is not None:
            kinds = names if labels is None else [_class(dataset, label) for label in labels]
            self.writer.add_embeddings("report/features", mat=rows.tolist(), metadata=kinds)

    def _show(self, tag: str, picture: Image.Image, step: int) -> None:
        if self.writer is not None:
            self.writer.add_image(tag, np.asarray(picture.convert("RGB")), step)


def _class(dataset: Samples, label: int) -> str:
    return dataset.class_names[label] if 0 <= label < len(dataset.class_names) else str(label)


def _load(dataset: Samples, count: int, title: str) -> _Shown:
    """``count`` readable images, drawn evenly from all; the same at each call.

    Raises:
        ValueError: there are none, or they differ in size.
    """
    order = np.random.default_rng(0).permutation(len(dataset))
    images, indices = [], []
    with tqdm(total=min(count, len(order)), desc=title, unit="image", leave=False, disable=None) as bar:
        for index in map(int, order):
            if len(images) == count:
                break
            try:
                content = dataset.content(index, np.random.default_rng([0, index]))
            except UnreadableImageError as error:
                logger.warning("report: left out: %s", error)
                continue
            images.append(np.asarray(content["image"], np.float32))
            indices.append(index)
            bar.update()
    if not images:
        raise ValueError("there are no images that can be read")
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            "the images differ in size: give the data set a transform that makes sizes equal, such as CenterCrop"
        )
    if images[0].ndim != 3:
        raise ValueError(f"the samples are no images [C, H, W], but have the shape {list(images[0].shape)}")
    by_index = np.argsort(indices)
    return _Shown(np.stack(images)[by_index], [indices[i] for i in by_index])


def _visible(image: np.ndarray, dataset: Samples) -> np.ndarray:
    """[C, H, W] as it went into the network -> [H, W, 3] of 8 bits."""
    steps = getattr(getattr(dataset, "transform", None), "transforms", [])
    for step in steps:
        if isinstance(step, Normalize):
            image = image * step.std + step.mean
    if image.shape[0] != 3:
        image = np.repeat(image[:1], 3, axis=0)
    low, high = (0.0, 1.0) if image.min() > -0.5 and image.max() < 1.5 else (image.min(), image.max())
    scaled = (image - low) / max(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def _thumbnail(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture
