"""The section ``Data`` of a run's configuration (channels, mean and std), which its weights do not show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from passl import checkpoint
from passl.convert.source import Source
from passl.yaml_io import parse

SIDECAR = ".convert.json"  # beside converted weights: what they are, and what Paddle has no place for
TORCH_KEY = "passl_data"  # beside student, teacher ... in a whole run in PyTorch's format


def of_states(states: Any) -> Optional[dict[str, Any]]:
    """The section in the configuration that ``.pdstates`` hold. Raises ConfigError when that is no YAML."""
    text = states.get("config") if isinstance(states, Mapping) else None
    config = parse(text, "the configuration in the checkpoint") if isinstance(text, str) and text else None
    return _section(config.get("Data")) if isinstance(config, Mapping) else None


def of_prefix(prefix: checkpoint.PathLike) -> Optional[dict[str, Any]]:
    """The section of the run under ``prefix``, or of what passl-convert made of one; None where there is none.

    Raises:
        ConfigError, CheckpointError, ValueError: a file beside the weights is damaged.
    """
    states = checkpoint.with_suffix(prefix, checkpoint.STATES)
    if states.is_file():
        return of_states(checkpoint.read(states))
    sidecar = Path(f"{checkpoint.with_suffix(prefix, '')}{SIDECAR}")
    kept = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else None
    return _section(kept.get("data")) if isinstance(kept, Mapping) else None


def of_source(source: Source) -> Optional[dict[str, Any]]:
    """The section that belongs to an opened file. Raises as ``of_prefix``."""
    if source.layout == "paddle":
        return of_prefix(source.path)
    return _section(source.aside.get(TORCH_KEY))


def _section(value: Any) -> Optional[dict[str, Any]]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) and value else None
