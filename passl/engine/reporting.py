"""When a run ends: its gallery and its ``report.html``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paddle import nn

from passl import distributed
from passl.engine.gallery import Gallery
from passl.engine.hooks import LogHook
from passl.engine.report import GALLERY, REPORT, write_report
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
            # Weights that were cast to half precision need inputs that are cast too.
            half = trainer.precision.level == "O2"
            with trainer.precision.autocast() if half else contextlib.nullcontext():
                log = self.log
                _write(
                    self.settings,
                    self.config,
                    trainer.method,
                    log.folder,
                    trainer.step,
                    log.writer,
                    log.evaluation_seconds,
                )
        distributed.barrier()


def report_evaluation(
    settings: ReportSettings,
    config: Mapping[str, Any],
    model: nn.Layer,
    folder: Path,
    results: Mapping[str, float],
    seconds: float,
    use_visualdl: bool,
) -> None:
    """The report of passl-eval, whose evaluators took ``seconds``; on the first process."""
    if not use_visualdl:
        _write(settings, config, model, folder, 0, None, seconds)
        return
    from visualdl import LogWriter

    with LogWriter(logdir=str(folder / "vdl")) as writer:
        for name, value in results.items():
            writer.add_scalar(tag=f"eval/{name}", step=0, value=value)
        _write(settings, config, model, folder, 0, writer, seconds)


def _write(
    settings: ReportSettings,
    config: Mapping[str, Any],
    model: nn.Layer,
    folder: Path,
    step: int,
    writer: Any,
    seconds: float,
) -> None:
    """What goes wrong here is said, and does not fail a run whose results are there already."""
    backbone = model.backbone if isinstance(model, Method) else model
    with _only_said(folder / GALLERY):
        gallery = Gallery(settings, folder, writer)
        if seconds:
            gallery.notes["seconds"]["evaluation"] = seconds
        gallery.make(backbone, config, step)
    with _only_said(folder / REPORT):
        logger.info("report: %s", write_report([folder], folder / REPORT))


@contextlib.contextmanager
def _only_said(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError))
        logger.error("%s was not written: %s", path, error, exc_info=None if expected else error)
