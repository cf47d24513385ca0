"""The features of a data set as files."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from passl import distributed
from passl.data.feature_files import write_features
from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import Evaluator, map_dataset
from passl.evaluators.names import relative_names
from passl.formats.atomic import replacing
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")


@EVALUATORS.register()
class Features(Evaluator):
    """The features of all samples: `{file}.npy`, float32 [N, D], and `{file}.csv`, which says of each row whose it is:
    the sample's path in the data set and, with labels, its label and class.

    Works with any backbone and the data it takes: images, or the regions of RegionFeatures for a RegionTransformer.
    Samples that cannot be read are left out. The features of all samples are held in memory, by each process.

    Args:
        dataset: with the transform of evaluation; for RegionFeatures with none.
        file: name of the two files, in the run's folder.
    """

    def __init__(self, dataset: Any, file: str = "features", batch_size: int = 64, num_workers: int = 0) -> None:
        check_batches(batch_size, num_workers)
        if not file or Path(file).name != file:
            raise ValueError(f"file ({file!r}) must be a name, without a folder and an ending")
        self.dataset = dataset
        self.file = file
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.key_metric = f"{file}_rows"

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        """Number and width of the rows that were written."""

        def features(images: paddle.Tensor) -> paddle.Tensor:
            return model(images).astype("float32")

        rows, _, indices = map_dataset(features, self.dataset, self.batch_size, self.file, num_workers=self.num_workers)
        if not np.isfinite(rows).all():
            raise ValueError("features are not finite: the weights are damaged, or of another network")
        if distributed.is_main():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            target = Path(output_dir) / f"{self.file}.npy"
            write_features(target, rows)
            with replacing(target.with_suffix(".csv")) as file:
                file.write(self._index(indices).encode())
            logger.info("%d rows of %d features: %s", *rows.shape, target)
        return {f"{self.file}_rows": float(len(rows)), f"{self.file}_width": float(rows.shape[1])}

    def _index(self, indices: np.ndarray) -> str:
        labels, classes = self.dataset.labels, self.dataset.class_names
        names = relative_names(self.dataset)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", *(("label",) if labels is not None else ()), *(("class",) if classes else ())))
        for index in indices:
            row = [names[index]]
            if labels is not None:
                row.append(str(labels[index]))
            if classes:
                row.append(classes[labels[index]] if labels[index] >= 0 else "")
            writer.writerow(row)
        return text.getvalue()
