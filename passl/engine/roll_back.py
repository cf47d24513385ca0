"""A run that goes on from an earlier point of its own, with something changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional


class RollBack(Exception):  # noqa: N818 (no error: the run goes on)
    """Raised in a step or by a hook, on all processes after the same step: train again from a good checkpoint.

    :func:`passl.engine.run.train` builds everything anew from it and moves later checkpoints aside.

    Args:
        reason: for the log.
        prefix: the checkpoint; None: the newest whole one of the run, or its beginning if there is none.
        progress: replaces these entries of ``trainer.progress``, which is saved with every checkpoint. The trainer
            itself obeys ``lr_factor`` (of the scheduled learning rate) and ``precision`` (level and dtype).
    """

    def __init__(
        self, reason: str, prefix: Optional[Path] = None, progress: Optional[Mapping[str, Any]] = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.prefix = prefix
        self.progress = dict(progress or {})
