"""Linear probes with several learning rates and features, all on one pass over a frozen backbone."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from paddle import nn
from tqdm import tqdm

from passl import distributed
from passl.evaluators.classification import check_batches
from passl.evaluators.evaluator import Evaluator
from passl.evaluators.frozen_features import (
    FeatureChoice,
    FrozenFeatures,
    check_labels,
    choices_for,
    extract_sets,
    how_to_use,
    save_probe,
)
from passl.evaluators.linear_heads import LinearHeads, cosine_by_epoch
from passl.evaluators.names import check_file_name
from passl.formats.atomic import replacing
from passl.registry import EVALUATORS

logger = logging.getLogger("passl")

_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
_TOPK = (1, 5)


@EVALUATORS.register()
class LinearSweep(Evaluator):
    """Top-1 and top-5 in percent of linear classifiers on frozen features, one for each combination of features,
    learning rate and weight decay; the images are seen once, and all classifiers of the same features are trained at
    once.

    Each is trained as the official probe: SGD with momentum, cosine per epoch to 0, weights N(0, 0.01). As in DINOv2
    the best is chosen on the validation images themselves, so its accuracy is a little flattered: for a number that is
    not, choose on a part of the training images given as `val_dataset` and measure that one.

    Written to the run's folder: `{file}.json` and `{file}.csv` with a row for each classifier, and
    `{file}_best.pdparams`, the best one with the backbone as a LinearProbe, for passl-eval, passl-export and
    passl-train.

    Args:
        train_dataset, val_dataset: labelled images, with the validation transform on both. A random transform is drawn
            once for each image.
        learning_rates: for batches of 256 images; multiplied by train_batch_size / 256.
        n_last_blocks, avgpool: as of LinearProbe; all pairs are tried.
        epochs: over the features.
        train_batch_size: features in a step; batch_size: images that the backbone is given at a time.
        file: what the names of files and results begin with.
        cache: keep the features: true in the run's folder, or in a folder that several runs share. They are used again
            while weights, images (by name, size and date) and transform are the same, and not kept where the transform
            is random.
    """

    def __init__(
        self,
        train_dataset: Any,
        val_dataset: Any,
        learning_rates: Sequence[float] = _RATES,
        weight_decays: Sequence[float] = (0.0,),
        n_last_blocks: Union[int, Sequence[int]] = (1, 4),
        avgpool: Union[bool, Sequence[bool]] = (False, True),
        epochs: int = 30,
        train_batch_size: int = 256,
        momentum: float = 0.9,
        seed: int = 0,
        cache: Union[bool, str] = False,
        file: str = "linear",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        check_labels(train_dataset, val_dataset)
        check_batches(batch_size, num_workers)
        n_last_blocks = [n_last_blocks] if isinstance(n_last_blocks, int) else list(n_last_blocks)
        avgpool = [avgpool] if isinstance(avgpool, bool) else list(avgpool)
        for name, values, lowest in (("learning_rates", learning_rates, 1e-30), ("weight_decays", weight_decays, 0)):
            if not len(values) or not all(lowest <= value < math.inf for value in values):
                limit = "above 0" if lowest else "from 0"
                raise ValueError(f"{name} ({list(values)}) must be one or more numbers {limit}")
        if not n_last_blocks or min(n_last_blocks) < 1 or not avgpool:
            raise ValueError(f"n_last_blocks ({n_last_blocks}) and avgpool ({avgpool}) must be one or more choices")
        for name, value in (("epochs", epochs), ("train_batch_size", train_batch_size)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if not 0 <= momentum < 1 or seed < 0:
            raise ValueError(f"momentum ({momentum}) must be at least 0 and below 1, and seed ({seed}) at least 0")
        check_file_name(file)
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.pairs = list(dict.fromkeys(itertools.product(learning_rates, weight_decays)))
        self.n_last_blocks = tuple(n_last_blocks)
        self.avgpool = tuple(avgpool)
        self.epochs = epochs
        self.train_batch_size = train_batch_size
        self.momentum = momentum
        self.seed = seed
        self.cache = cache
        self.file = file
        self.key_metric = f"{file}_top1"
        self.batch_size = batch_size
        self.num_workers = num_workers

    def run(self, model: nn.Layer, output_dir: Path) -> dict[str, float]:
        """The best classifier's `linear_top1`, `linear_top5` and `linear_loss`, and the best top-1 of each choice of
        features, `linear_top1_n4_avgpool` for example; `linear` is `file`.
        """
        choices = choices_for(model, self.n_last_blocks, self.avgpool)
        train, val, num_classes = extract_sets(self, model, choices, "linear", output_dir)
        rows, best = self._of_all_processes(choices, train, val, num_classes)
        if best is None:
            raise ValueError("every classifier diverged: give lower learning_rates")
        if distributed.is_main():
            self._write(model, rows, best, num_classes, Path(output_dir))
        results = {f"{self.file}_{name}": best[0][name] for name in ("top1", "top5", "loss")}
        for choice in choices:
            results[f"{self.file}_top1_{choice}"] = max(row["top1"] for row in rows if row["features"] == str(choice))
        return results

    def _of_all_processes(
        self, choices: Sequence[FeatureChoice], train: FrozenFeatures, val: FrozenFeatures, num_classes: int
    ) -> tuple[list[dict[str, Any]], Optional[tuple]]:
        """The rows of all classifiers, and of the best its row, choice, weight and bias; each process trains its share
        of the choices.
        """
        own, own_best = [], None
        for choice in choices[distributed.rank() :: distributed.world_size()]:
            heads = self._trained(choice, train, num_classes)
            found = self._rows(choice, heads, val)
            own += found
            number = _best_of(found)
            if number is not None and (own_best is None or _is_better(found[number], own_best[0])):
                own_best = (found[number], choice, *heads.head(number))
        gathered = distributed.gather_objects((own, own_best))
        order = [str(choice) for choice in choices]
        rows = sorted((row for part, _ in gathered for row in part), key=lambda row: order.index(row["features"]))
        best = None
        for candidate in (one for _, one in gathered if one is not None):
            ties = best is not None and order.index(str(candidate[1])) < order.index(str(best[1]))
            if best is None or _is_better(candidate[0], best[0], ties):
                best = candidate
        return rows, best

    def _trained(self, choice: FeatureChoice, train: FrozenFeatures, num_classes: int) -> LinearHeads:
        columns, count = train.columns(choice), len(train.labels)
        width = train.rows[:1, columns].shape[1]
        weight = 0.01 * np.random.default_rng([self.seed, width]).standard_normal((width, num_classes))
        scale = self.train_batch_size / 256
        heads = LinearHeads(
            [rate * scale for rate, _ in self.pairs],
            [decay for _, decay in self.pairs],
            weight,
            np.zeros(num_classes),
            self.momentum,
        )
        factors = tqdm(cosine_by_epoch(self.epochs), desc=f"linear: {choice}", unit="epoch", leave=False, disable=None)
        for epoch, factor in enumerate(factors):
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            for start in range(0, count, self.train_batch_size):
                batch = order[start : start + self.train_batch_size]
                heads.step(train.rows[batch][:, columns], train.labels[batch], factor)
        return heads

    def _rows(self, choice: FeatureChoice, heads: LinearHeads, val: FrozenFeatures) -> list[dict[str, Any]]:
        rates, losses = heads.rates(val.of(choice), val.labels, _TOPK)
        return [
            {
                "features": str(choice),
                "n_last_blocks": choice.n_last_blocks,
                "avgpool": choice.avgpool,
                "learning_rate": rate,
                "weight_decay": decay,
                # One that diverged has no accuracy, whatever its infinite logits happen to say.
                **{f"top{k}": float(value) if np.isfinite(loss) else 0.0 for k, value in zip(_TOPK, values)},
                "loss": float(loss),
            }
            for (rate, decay), values, loss in zip(self.pairs, rates, losses)
        ]

    def _write(
        self, model: nn.Layer, rows: list[dict[str, Any]], best: tuple, num_classes: int, output_dir: Path
    ) -> None:
        row, choice, weight, bias = best
        target = output_dir / f"{self.file}_best.pdparams"
        save_probe(model, weight, bias, target)
        finite = [{**one, "loss": one["loss"] if np.isfinite(one["loss"]) else None} for one in rows]
        summary = {"best": row, "chosen_on": "val_dataset", "epochs": self.epochs, "rows": finite}
        with replacing(output_dir / f"{self.file}.json") as file:
            file.write((json.dumps(summary, indent=2) + "\n").encode())
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(output_dir / f"{self.file}.csv") as file:
            file.write(text.getvalue().encode())
        for one in rows:
            logger.info(
                "linear: %-12s lr %-8g weight decay %-8g top1 %6.2f  top5 %6.2f  loss %.4f%s",
                one["features"], one["learning_rate"], one["weight_decay"], one["top1"], one["top5"], one["loss"],
                "  <- best, chosen on these images" if one is row or one == row else "",
            )  # fmt: skip
        rates = [rate for rate, _ in self.pairs]
        if len(set(rates)) > 1 and row["learning_rate"] in (min(rates), max(rates)):
            logger.warning("linear: the best learning rate (%g) is at the end of those tried", row["learning_rate"])
        options = how_to_use(target, choice, num_classes)
        logger.info("linear: the best is kept as a LinearProbe, to be used with %s", options)


def _best_of(rows: Sequence[dict[str, Any]]) -> Optional[int]:
    """The number of the best row; None if all diverged."""
    best: Optional[int] = None
    for number, row in enumerate(rows):
        if np.isfinite(row["loss"]) and (best is None or _is_better(row, rows[best])):
            best = number
    return best


def _is_better(row: dict[str, Any], than: dict[str, Any], at_equality: bool = False) -> bool:
    """By top-1, then by the loss."""
    one, other = (row["top1"], -row["loss"]), (than["top1"], -than["loss"])
    return one > other or (at_equality and one == other)
