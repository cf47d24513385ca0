"""The features that linear classifiers see, of whole data sets: computed once, kept on disk."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import paddle
from paddle import nn

from passl import checkpoint, distributed
from passl.evaluators import fingerprint
from passl.evaluators.evaluator import map_dataset
from passl.evaluators.labels import check_labelled
from passl.formats.atomic import replacing
from passl.models.probe import check_num_blocks

logger = logging.getLogger("passl")

CACHE = "feature_cache"
_NAME = re.compile(r"(?P<key>[0-9a-f]{32})-(?P<blocks>\d+)(?P<mean>-mean)?\.npz")
_MAX_CLASSES = 1 << 16


class FeatureChoice(NamedTuple):
    """What a linear probe sees, see `LinearProbe`; 0 blocks: the output of a backbone that has no blocks."""

    n_last_blocks: int
    avgpool: bool

    def __str__(self) -> str:
        return "output" if self.n_last_blocks == 0 else f"n{self.n_last_blocks}" + ("_avgpool" if self.avgpool else "")


@dataclass
class FrozenFeatures:
    """Of the N images that could be read.

    Attributes:
        rows: [N, (num_blocks + has_mean) * dim] float32: the [CLS] tokens of the last blocks, the earliest first, then
            the mean of the last block's patch tokens; of a backbone without blocks (num_blocks 0) its output.
        labels: [N].
    """

    rows: np.ndarray
    labels: np.ndarray
    num_blocks: int
    has_mean: bool

    def columns(self, choice: FeatureChoice) -> Union[slice, np.ndarray]:
        """Where ``rows`` has what a probe sees, in its order."""
        if self.num_blocks == 0:
            return slice(None)
        dim = self.rows.shape[1] // (self.num_blocks + self.has_mean)
        first, end = (self.num_blocks - choice.n_last_blocks) * dim, self.num_blocks * dim
        if not choice.avgpool:
            return slice(first, end)
        last = np.stack([np.arange(end - dim, end), np.arange(end, end + dim)], axis=1).ravel()
        return np.concatenate([np.arange(first, end - dim), last])

    def of(self, choice: FeatureChoice) -> np.ndarray:
        """[N, W] of one choice."""
        return self.rows[:, self.columns(choice)]


def choices_for(backbone: nn.Layer, n_last_blocks: Sequence[int], avgpool: Sequence[bool]) -> list[FeatureChoice]:
    """All pairs; for a backbone without blocks its output alone.

    Raises:
        ValueError: more blocks than the backbone has.
    """
    if not hasattr(backbone, "get_intermediate_layers"):
        return [FeatureChoice(0, False)]
    for number in n_last_blocks:
        check_num_blocks(number, backbone)
    return list(dict.fromkeys(FeatureChoice(number, mean) for number in n_last_blocks for mean in avgpool))


def extract(
    backbone: nn.Layer,
    dataset: Any,
    choices: Sequence[FeatureChoice],
    title: str,
    cache: Optional[Path] = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> FrozenFeatures:
    """The features of all images for all ``choices``, in one pass, shared out over the processes; on each of them.

    Args:
        cache: folder of what was computed before by the same weights from the same files with the same transform. It is
            not used where the transform is random.

    Raises:
        ValueError: features that are not finite.
    """
    num_blocks, has_mean = max(one.n_last_blocks for one in choices), any(one.avgpool for one in choices)
    file = None if cache is None else _cache_file(backbone, dataset, cache, num_blocks, has_mean, title)
    found = None if file is None else _cached(file, num_blocks, has_mean)
    if found is not None:
        return found

    def features(images: paddle.Tensor) -> paddle.Tensor:
        if num_blocks == 0:
            return backbone(images).astype("float32")
        tokens = backbone.get_intermediate_layers(images, num_blocks)
        parts = [x[:, 0] for x in tokens] + ([tokens[-1][:, 1:].mean(1)] if has_mean else [])
        return paddle.concat(parts, axis=-1).astype("float32")

    rows, labels, _ = map_dataset(features, dataset, batch_size, title, num_workers=num_workers)
    broken = np.count_nonzero(~np.isfinite(rows.sum(axis=1)))
    if broken:
        raise ValueError(f"{broken} of {len(rows)} feature rows are not finite: the weights are probably broken")
    made = FrozenFeatures(rows, labels, num_blocks, has_mean)
    if file is not None and distributed.is_main():
        _write(made, file)
    return made


def extract_sets(
    evaluator: Any, backbone: nn.Layer, choices: Sequence[FeatureChoice], title: str, output_dir: Path
) -> tuple[FrozenFeatures, FrozenFeatures, int]:
    """Those of an evaluator's training and validation images, and the number of classes; see `extract`.

    evaluator: with train_dataset, val_dataset, cache, batch_size and num_workers.
    """
    folder = cache_folder(evaluator.cache, output_dir)
    train, val = (
        extract(
            backbone,
            dataset,
            choices,
            f"{title}: {split} features",
            folder,
            evaluator.batch_size,
            evaluator.num_workers,
        )
        for dataset, split in ((evaluator.train_dataset, "train"), (evaluator.val_dataset, "val"))
    )
    return train, val, count_classes(evaluator.train_dataset, evaluator.val_dataset)


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_folder(cache: Union[bool, str], output_dir: Path) -> Optional[Path]:
    """Of the argument ``cache``: none, a folder in the run's, or any folder."""
    if isinstance(cache, str):
        return Path(cache).expanduser()
    return Path(output_dir) / CACHE if cache else None


def _cache_file(
    backbone: nn.Layer, dataset: Any, folder: Path, num_blocks: int, has_mean: bool, title: str
) -> Optional[Path]:
    """A file that has, or will have, these features; None: there cannot be one. Decided by the first process."""
    found: Optional[str] = None
    if distributed.is_main():
        try:
            if fingerprint.draws_at_random(dataset):
                logger.info("%s: the transform is random, so features are not kept", title)
            else:
                found = str(_matching(folder, _key(backbone, dataset), num_blocks, has_mean, title))
        except fingerprint.NotDescribableError as error:
            logger.warning("%s: features are not kept: %s", title, error)
    found = distributed.broadcast_object(found)
    return None if found is None else Path(found)


def _key(backbone: nn.Layer, dataset: Any) -> str:
    network, data = fingerprint.of_network(backbone), fingerprint.of_data(dataset)
    return f"{network[:16]}{data[:16]}"


def _matching(folder: Path, key: str, num_blocks: int, has_mean: bool, title: str) -> Path:
    """The smallest file of these images and weights that has at least these features, or the name of a new one."""
    enough, others = [], 0
    for path in sorted(folder.glob("*.npz")) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None or match["key"] != key:
            others += match is not None
        elif int(match["blocks"]) >= num_blocks and (match["mean"] or not has_mean):
            enough.append((path.stat().st_size, path))
    if enough:
        return min(enough)[1]
    if others:
        logger.info("%s: the %d file(s) in %s are of other weights, images or transforms", title, others, folder)
    return folder / f"{key}-{num_blocks}{'-mean' if has_mean else ''}.npz"


def _cached(file: Path, num_blocks: int, has_mean: bool) -> Optional[FrozenFeatures]:
    """What ``file`` holds, if all processes can read it."""
    found = _read(file) if file.exists() else None
    if not all(distributed.gather_objects(found is not None)):
        return None
    logger.info("features from %s", file)
    return found


def _read(file: Path) -> Optional[FrozenFeatures]:
    try:
        with np.load(file, allow_pickle=False) as arrays:  # checks the sums of its parts
            rows, labels = arrays["rows"], arrays["labels"]
    except Exception as error:  # damaged bytes can end in any error of numpy's and zipfile's
        logger.warning("%s: damaged (%s: %s): its features are computed anew", file, type(error).__name__, error)
        return None
    match = _NAME.fullmatch(file.name)
    if match is None or rows.ndim != 2 or rows.dtype != np.float32 or labels.shape != rows.shape[:1]:
        logger.warning("%s: not what it should be: its features are computed anew", file)
        return None
    return FrozenFeatures(rows, labels, int(match["blocks"]), match["mean"] is not None)


def _write(features: FrozenFeatures, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as target:
            np.savez(target, rows=features.rows, labels=features.labels)
    except OSError as error:
        logger.warning("features are not kept: %s", error)  # they are there, in memory
        return
    logger.info("%d rows of features are kept in %s", len(features.rows), file)


# --- labels and heads ------------------------------------------------------------------------------------------------


def check_labels(train_dataset: Any, val_dataset: Any) -> None:
    """Raises ValueError for labels that do not agree (see `check_labelled`), or too large to have a weight for each."""
    check_labelled(train_dataset, val_dataset)
    for name, dataset in (("train_dataset", train_dataset), ("val_dataset", val_dataset)):
        if len(dataset.labels) and int(np.max(dataset.labels)) >= _MAX_CLASSES:
            raise ValueError(
                f"a label of {name} is {int(np.max(dataset.labels))}: number the classes from 0 without gaps"
            )


def count_classes(*datasets: Any) -> int:
    return max(max(len(one.class_names), int(np.max(one.labels)) + 1) for one in datasets)


def save_probe(backbone: nn.Layer, weight: np.ndarray, bias: np.ndarray, target: Path) -> None:
    """Backbone and classifier (weight [W, C], bias [C]) as a LinearProbe's weights, as passl-train would write them."""
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    for name, value in (("weight", weight), ("bias", bias)):
        tensor = paddle.to_tensor(value.astype(np.float32))
        tensor.name = state_name = f"linear.linear.{name}"  # its own counts the tensors of this process
        state[state_name] = tensor
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(state, target)


def how_to_use(target: Path, choice: FeatureChoice, num_classes: int) -> str:
    """What to type for ``target`` with passl-eval, passl-export or passl-train."""
    what = f"-o {shlex.quote(f'Global.pretrained_model={target}')} -o Model.num_classes={num_classes}"
    if choice.n_last_blocks == 0:
        return what
    return f"{what} -o Model.n_last_blocks={choice.n_last_blocks} -o Model.avgpool={str(choice.avgpool).lower()}"
