"""What an evaluator is, and how features and predictions of a whole data set come together from all processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from passl import distributed
from passl.config import ConfigError
from passl.data.loader import EpochSampler, Loader
from passl.models.method import Method

logger = logging.getLogger("passl")


class EvaluationError(ValueError):
    """Data or weights that an evaluator cannot measure."""


class Evaluator:
    """Reads a frozen model and returns numbers; nothing in it has a gradient.

    Attributes:
        subject: which part of a method :meth:`run` is given: its "backbone", or the whole "method", or that for its
            "backbones" named in ``models``.
        models: which of a method's backbones are measured.
        key_metric: the number of :meth:`run`'s result that decides which checkpoint is best (higher is better).
    """

    subject = "backbone"
    models: Sequence[str] = ("teacher",)
    key_metric = ""

    def result_names(self) -> Sequence[str]:
        """Those of the results of :meth:`run` whose names are known before it: no other evaluator may have them too."""
        return [self.key_metric] if self.key_metric else []

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        """Measure ``model`` (in eval mode by now); files, if any, go to ``output_dir``."""
        raise NotImplementedError


def backbones_of(model: nn.Layer) -> dict[str, nn.Layer]:
    """The backbones of a method by name; a layer that is no method is its own, as "teacher"."""
    return model.backbones() if isinstance(model, Method) else {"teacher": getattr(model, "backbone", model)}


def evaluate(evaluator: Evaluator, method: nn.Layer, output_dir: Path) -> dict[str, float]:
    """Run ``evaluator`` on the part of ``method`` it wants, in eval mode and without gradients.

    Raises:
        EvaluationError: it cannot measure this; the text begins with its name.
    """
    model = getattr(method, "backbone", method) if evaluator.subject == "backbone" else method
    model.eval()
    with paddle.no_grad():
        try:
            return evaluator.run(model, output_dir)
        except ValueError as error:
            if isinstance(error, (EvaluationError, ConfigError)):
                raise
            raise EvaluationError(f"{type(evaluator).__name__}: {error}") from error


def map_dataset(
    function: Callable[[paddle.Tensor], paddle.Tensor], dataset: Any, batch_size: int, title: str, **loading: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``function`` of every image, shared out over processes and put together in the order of the data set.

    Args:
        function: images [B, C, H, W] -> one row each [B, ...].
        loading: ``num_workers`` and the like, for the Loader.

    Returns:
        Rows [N, ...], labels [N] (-1 for images without a label) and the samples' indices [N] (those that cannot be
        read are missing), on every process.
    """
    rows, labels, indices = [], [], []
    for batch in _batches(dataset, batch_size, title, loading):
        images = batch["image"]
        rows.append(function(images if isinstance(images, paddle.Tensor) else paddle.to_tensor(images)).numpy())
        indices.append(np.asarray(batch["index"]))
        labels.append(np.asarray(batch["label"]) if "label" in batch else np.full(len(indices[-1]), -1))
    gathered = [distributed.gather_rows(np.concatenate(parts)) for parts in (rows, labels, indices)]
    # Processes get equal shares, so a few images at the end may come twice.
    _, first = np.unique(gathered[2], return_index=True)
    warn_of_missing(title, len(first), len(dataset))
    return gathered[0][first], gathered[1][first], gathered[2][first]


def warn_of_missing(title: str, count: int, length: int) -> None:
    """Says how many of ``length`` images are not among the ``count`` that were read."""
    if count < length:
        logger.warning("%s: %d of %d images cannot be read and are left out", title, length - count, length)


def _batches(dataset: Any, batch_size: int, title: str, loading: dict[str, Any]) -> Iterator[dict[str, Any]]:
    sampler = EpochSampler(
        len(dataset),
        batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        shuffle=False,
        drop_last=False,
    )
    loader = Loader(dataset, sampler, **loading)
    batches = loader.iterate(0, sampler.steps_per_epoch)
    hidden = None if distributed.is_main() else True  # None: shown on a terminal only
    yield from tqdm(batches, total=sampler.steps_per_epoch, desc=title, unit="batch", leave=False, disable=hidden)
    loader.share_bad_samples(distributed.gather_objects)
