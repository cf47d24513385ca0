"""Files of weights and of whole runs: written atomically, read without executing anything, loaded with a strict report.

A checkpoint is three files with one prefix: ``.pdparams`` (state of the method), ``.pdopt`` (state of the optimizer,
keyed by structured parameter names) and ``.pdstates`` (step, metrics, versions, and the checksums of the other two).
The last one is written last, so a set that has it and whose checksums agree is whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import paddle
from paddle import nn

from passl.formats import paddle_reader
from passl.formats.paddle_reader import CheckpointError

PARAMS, OPTIMIZER, STATES = ".pdparams", ".pdopt", ".pdstates"
_BACKBONE_KEYS = {"teacher": "teacher.backbone.", "student": "student.backbone."}

logger = logging.getLogger("passl")
PathLike = Union[str, Path]


# --- reading -------------------------------------------------------------------------------------------------------


def read(path: PathLike) -> Any:
    """The object in a file that ``paddle.save`` wrote, with numpy arrays for tensors; executes nothing in it.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but arrays and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file{_neighbours(path)}")
    try:
        with path.open("rb") as file:
            return paddle_reader.load(file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # damaged bytes are instructions to pickle and numpy: anything can come of them
        raise CheckpointError(f"{path}: damaged, or not written by Paddle ({type(error).__name__}: {error})") from error


def read_weights(prefix: PathLike, widen: bool = True) -> dict[str, np.ndarray]:
    """The state dict in ``{prefix}.pdparams`` (the suffix may be given): name -> array of numbers; bfloat16 as float32
    of the same value, or (``widen=False``) as the uint16 that Paddle saves."""
    path = with_suffix(prefix, PARAMS)
    state = read(path)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds no state dict (name -> array)")
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: holds no state dict (name -> array): the key {name!r} is no text")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise CheckpointError(f"{path}: holds no state dict (name -> array): {name!r} is no numbers, but {kind}")
    bits = {name: value for name, value in state.items() if value.dtype == np.uint16 and widen}
    return {**state, **{name: (value.astype(np.uint32) << 16).view(np.float32) for name, value in bits.items()}}


def with_suffix(prefix: PathLike, suffix: str) -> Path:
    """``prefix`` with ``suffix``, instead of a checkpoint suffix that it may carry; ``~`` is the home folder."""
    text = os.path.expanduser(prefix)
    for known in (PARAMS, OPTIMIZER, STATES):
        if text.endswith(known):
            text = text[: -len(known)]
    return Path(text + suffix)


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    found = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))[:8]
    return f"; the folder has {', '.join(found) if found else f'no {path.suffix} file'}"


# --- loading into layers ---------------------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """What became of the keys of a file: loaded; in the layer only; in the file only; of another shape."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} of {len(self.matched) + len(self.missing) + len(self.misshapen)} keys matched"]
        for title, keys in (
            ("missing in the file", self.missing),
            ("of another shape", self.misshapen),
            ("only in the file", self.unexpected),
        ):
            if keys:
                more = f" ... and {len(keys) - 20} more" if len(keys) > 20 else ""
                lines.append(f"{len(keys)} {title}: {', '.join(keys[:20])}{more}")
        return "; ".join(lines)


def load_weights(layer: nn.Layer, state: Mapping[str, np.ndarray], source: PathLike = "the state dict") -> LoadReport:
    """Copy ``state`` into ``layer``; every key must match in name and shape, else nothing is changed.

    Raises:
        CheckpointError: keys are missing, left over, or misshapen; the text lists them.
    """
    report = LoadReport(unexpected=sorted(set(state) - set(layer.state_dict())))
    ready: dict[str, np.ndarray] = {}
    for name, target in layer.state_dict().items():
        if name not in state:
            report.missing.append(name)
            continue
        value = np.asarray(state[name])
        if tuple(value.shape) != tuple(target.shape):
            report.misshapen.append(f"{name} (file {list(value.shape)}, layer {list(target.shape)})")
            continue
        report.matched.append(name)
        ready[name] = paddle.to_tensor(value).astype(target.dtype)
    if report.missing or report.unexpected or report.misshapen:
        raise CheckpointError(f"{source} does not fit {type(layer).__name__}: {report}")
    layer.set_state_dict(ready)
    return report


def backbone_state(state: Mapping[str, np.ndarray], which: str = "teacher") -> dict[str, np.ndarray]:
    """The backbone's part of the state of a DINO run (``which``: teacher or student), a probe, or a backbone."""
    if which not in _BACKBONE_KEYS:
        raise CheckpointError(f"checkpoint_key ({which!r}) must be one of {', '.join(_BACKBONE_KEYS)}")
    for prefix in (_BACKBONE_KEYS[which], "backbone."):
        part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if part:
            return part
    return dict(state)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(value: Any, path: PathLike) -> None:
    """``paddle.save`` that leaves either the whole new file or what was there before, whatever happens on the way."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        paddle.save(value, str(partial), protocol=4)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class CheckpointStore:
    """The checkpoints of one run in a folder: sets ``epoch_{n}`` and ``step_{n}``, ``latest``, ``previous``, ``best``.

    The last three are hard links (copies where there are none) to a set that is whole by then, so a crash at any moment
    leaves at least one whole set, and damage to ``latest`` the one before it; :meth:`newest_intact` finds it.

    Args:
        folder: created when missing.
        max_num_latest: how many ``epoch_{n}`` sets stay beside latest and best: 0 none, N the newest N, -1 all.
    """

    def __init__(self, folder: PathLike, max_num_latest: int = 0) -> None:
        if max_num_latest < -1:
            raise ValueError(f"max_num_latest_checkpoint ({max_num_latest}) must be -1 (all), 0 (none) or a number")
        self.folder = Path(os.path.expanduser(folder))
        self.max_num_latest = max_num_latest

    def save(
        self, name: str, params: Mapping, optimizer: Mapping, states: Mapping[str, Any], best: bool = False
    ) -> None:
        """Write the set ``name``, point ``latest`` (and ``best``) at it, and prune.

        Raises:
            OSError: the disk is full or read-only; the sets that were there before are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        prefix = self.folder / name
        try:
            # In one order: a resumed optimizer gives its entries in another than one that never stopped.
            write(_ordered(params), with_suffix(prefix, PARAMS))
            write(_ordered(optimizer), with_suffix(prefix, OPTIMIZER))
            checksums = {suffix: checksum(with_suffix(prefix, suffix)) for suffix in (PARAMS, OPTIMIZER)}
            write({**states, "checksums": checksums}, with_suffix(prefix, STATES))
        except OSError:
            if not with_suffix(prefix, STATES).exists():  # half a set would take the room that the next one needs
                for suffix in (PARAMS, OPTIMIZER):
                    with_suffix(prefix, suffix).unlink(missing_ok=True)
            raise
        _flush_names(self.folder)  # `latest` must not come to the disk before the set that it is of
        if all((self.folder / f"latest{suffix}").exists() for suffix in (PARAMS, OPTIMIZER, STATES)):
            self._link(self.folder / "latest", "previous")
        for alias in ["latest", "best"] if best else ["latest"]:
            self._link(prefix, alias)
        _flush_names(self.folder)  # before an older set is removed
        self._prune()

    def _link(self, prefix: Path, alias: str) -> None:
        for suffix in (PARAMS, OPTIMIZER, STATES):
            _link(with_suffix(prefix, suffix), self.folder / (alias + suffix))

    def newest_intact(self) -> Optional[Path]:
        """Prefix of the whole set with the highest step (``latest`` where it is one of them), None where none was ever
        saved.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        candidates = []
        for path in self.folder.glob(f"*{STATES}"):
            try:
                candidates.append((run_states(path)["step"], path.name == f"latest{STATES}", with_suffix(path, "")))
            except CheckpointError as error:
                logger.warning("checkpoint skipped: %s", error)
        for *_, prefix in sorted(candidates, reverse=True):
            try:
                read_states(prefix)
            except CheckpointError as error:
                logger.warning("checkpoint skipped: %s", error)
                continue
            latest = self.folder / "latest"
            if prefix != latest and with_suffix(latest, PARAMS).exists():
                logger.warning("the last save did not come to its end: going on from %s, not %s", prefix, latest)
            return prefix
        if not self.is_empty():
            raise CheckpointError(f"{self.folder}: no checkpoint in it is whole; start anew with another output_dir")
        return None

    def is_empty(self) -> bool:
        """Whether there is nothing to lose: no files, or those of a first save that was cut off."""
        names = {path.stem for path in self.folder.glob(f"*{PARAMS}")}
        is_cut_off = len(names) == 1 and all(name.startswith(("step_", "epoch_")) for name in names)
        return not names or (is_cut_off and not any(self.folder.glob(f"*{STATES}")))

    def set_aside(self, after_step: int) -> Optional[Path]:
        """Move the sets of steps later than ``after_step`` into a new folder ``abandoned-{n}``; None if there are none.

        For a run that goes on from an older set: what it saves must not compete with the branch that it leaves.
        """
        later = []
        for path in self.folder.glob(f"*{STATES}"):
            with contextlib.suppress(CheckpointError):
                if run_states(path)["step"] > after_step:
                    later.append(with_suffix(path, ""))
        if not later:
            return None
        aside = unused_name(self.folder / "abandoned")
        aside.mkdir()
        for prefix in later:
            # The states last: a set without them counts as damaged, not as another branch.
            for suffix in (PARAMS, OPTIMIZER, STATES):
                if with_suffix(prefix, suffix).exists():
                    with_suffix(prefix, suffix).rename(aside / (prefix.name + suffix))
        return aside

    def _prune(self) -> None:
        for path in self.folder.glob("*.partial"):
            path.unlink(missing_ok=True)
        sets = {with_suffix(p, "") for p in self.folder.glob(f"*{PARAMS}")}
        epochs = sorted((p for p in sets if _number(p, "epoch_") is not None), key=lambda p: _number(p, "epoch_") or 0)
        surplus = [p for p in sets if _number(p, "step_") is not None]
        if self.max_num_latest >= 0:
            surplus += epochs[: len(epochs) - self.max_num_latest]
        for prefix in surplus:
            for suffix in (STATES, OPTIMIZER, PARAMS):
                with_suffix(prefix, suffix).unlink(missing_ok=True)


def unused_name(path: Path) -> Path:
    """``{path}-{n}`` with the first n for which nothing is there."""
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


def read_states(prefix: PathLike) -> dict[str, Any]:
    """``{prefix}.pdstates``, once the other two files have been checked against it.

    Raises:
        CheckpointError: a file is missing or damaged, or the three were not saved together.
    """
    states = run_states(prefix)
    for suffix, expected in states["checksums"].items():
        path = with_suffix(prefix, suffix)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file{_neighbours(path)}")
        if checksum(path) != expected:
            raise CheckpointError(f"{path}: damaged, or not saved together with {Path(prefix).name}{STATES}")
    return states


def run_states(prefix: PathLike) -> dict[str, Any]:
    """``{prefix}.pdstates`` alone: nothing is known of the other two files."""
    path = with_suffix(prefix, STATES)
    states = read(path)
    checksums = states.get("checksums") if isinstance(states, dict) else None
    if not isinstance(checksums, dict) or not isinstance(states.get("step"), int):
        raise CheckpointError(f"{path}: not the state of a passl run")
    if set(checksums) != {PARAMS, OPTIMIZER}:
        raise CheckpointError(f"{path}: has checksums of {sorted(checksums, key=str)}, not of the other two files")
    return states


def _ordered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Equal states as equal files: keys in order, and no names of tensors that count what a process did before."""
    for key, value in state.items():
        if isinstance(value, paddle.Tensor) and value.name.startswith(("eager_tmp", "generated_tensor")):
            value.name = key
    return {key: _ordered(value) if isinstance(value, dict) else value for key, value in sorted(state.items())}


def checksum(path: Path) -> int:
    """What :func:`read_states` compares of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _link(source: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        os.link(source, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, partial)
    os.replace(partial, target)


def _flush_names(folder: Path) -> None:
    """Files are on the disk when they are written; their names in ``folder`` are from here on."""
    with contextlib.suppress(OSError):  # not every file system can
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _number(prefix: Path, kind: str) -> Optional[int]:
    name = prefix.name
    return int(name[len(kind) :]) if name.startswith(kind) and name[len(kind) :].isdigit() else None
