"""When a run ends: its gallery and its ``report.html``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddle import nn

from passl import distributed
from passl.engine.gallery import Gallery, dataset_of
from passl.engine.hooks import LogHook
from passl.engine.report import REPORT, write_report
from passl.engine.settings import ReportSettings
from passl.engine.trainer import Trainer
from passl.models.method import Method

logger = logging.getLogger("passl")


class ReportHook:
    """Writes the report once the last step is done. It comes before the log, whose VisualDL it writes to.

    Args:
        config: of the run, for the images to show.
    """

    def __init__(self, settings: ReportSettings, config: Mapping[str, Any], log: LogHook) -> None:
        self.settings = settings
        self.config = config
        self.log = log

    def before_train(self, trainer: Trainer) -> None:
        """Nothing."""

    def after_step(self, trainer: Trainer) -> None:
        """Nothing."""

    def after_train(self, trainer: Trainer) -> None:
        if trainer.step < trainer.stop_step or trainer.is_interrupted:
            return
        if distributed.is_main():
            _write(self.settings, self.config, trainer.method, self.log.folder, trainer.step, self.log.writer)
        distributed.barrier()


def report_evaluation(
    settings: ReportSettings,
    config: Mapping[str, Any],
    model: nn.Layer,
    folder: Path,
    results: Mapping[str, float],
    use_visualdl: bool,
) -> None:
    """The report of passl-eval; on the first process."""
    if not use_visualdl:
        _write(settings, config, model, folder, 0, None)
        return
    from visualdl import LogWriter

    with LogWriter(logdir=str(folder / "vdl")) as writer:
        for name, value in results.items():
            writer.add_scalar(tag=f"eval/{name}", step=0, value=value)
        _write(settings, config, model, folder, 0, writer)


def _write(
    settings: ReportSettings, config: Mapping[str, Any], model: nn.Layer, folder: Path, step: int, writer: Any
) -> None:
    """What goes wrong here is said, and does not fail a run whose results are there already."""
    backbone = model.backbone if isinstance(model, Method) else model
    try:
        dataset = dataset_of(config)
        if dataset is not None:
            Gallery(settings, folder, writer).make(backbone, dataset, step)
        logger.info("report: %s", write_report([folder], folder / REPORT))
    except (ValueError, OSError) as error:
        logger.error("%s was not written: %s", folder / REPORT, error)
