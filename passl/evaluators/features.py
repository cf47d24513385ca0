"""The features of a data set as files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from paddle import nn

from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import Evaluator
from passl.evaluators.feature_rows import check_kinds, write_rows
from passl.evaluators.names import check_file_name
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")


@EVALUATORS.register()
class Features(Evaluator):
    """The features of all samples: `{file}.npy`, [N, D], and `{file}.csv`, which says of each row whose it is: the
    sample's path in the data set and, with labels, its label and class. Several kinds have a file each,
    `{file}.cls.npy`, `{file}.patch.npy`, and the csv in common.

    Works with any backbone and the data it takes: images, or the regions of RegionFeatures for a RegionTransformer.
    Samples that cannot be read are left out. Rows are written as they come: memory does not grow with them.

    Args:
        dataset: with the transform of evaluation; for RegionFeatures with none.
        file: name of the files, in the run's folder.
        what: cls, the output of the backbone [N, D], which is a transformer's normalised [CLS]; patch [N, h, w, D];
            mean, that of the patches [N, D].
        layer: number of the block, from 0; negative from the end.
        dtype: of the files.
    """

    def __init__(
        self,
        dataset: Any,
        file: str = "features",
        batch_size: int = 64,
        num_workers: int = 0,
        what: Sequence[Literal["cls", "patch", "mean"]] = ("cls",),
        layer: int = -1,
        dtype: Literal["float16", "float32"] = "float32",
    ) -> None:
        check_batches(batch_size, num_workers)
        check_file_name(file)
        check_kinds(what, dtype)
        self.dataset = dataset
        self.file = file
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.what = tuple(what)
        self.layer = layer
        self.dtype = dtype
        self.key_metric = f"{file}_rows"

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        """Number and width of the rows that were written."""
        folder = Path(output_dir)
        several = len(self.what) > 1
        targets = {kind: folder / f"{self.file}{f'.{kind}' if several else ''}.npy" for kind in self.what}
        count, shapes = write_rows(
            model,
            self.dataset,
            targets,
            folder / f"{self.file}.csv",
            self.layer,
            self.dtype,
            self.batch_size,
            self.num_workers,
        )
        for kind, target in targets.items():
            logger.info("%d rows of %s features: %s", count, " x ".join(map(str, shapes[kind])), target)
        return {f"{self.file}_rows": float(count), f"{self.file}_width": float(shapes[self.what[0]][-1])}
