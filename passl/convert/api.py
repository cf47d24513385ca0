"""``convert`` and what else the rest of passl asks of a foreign file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from paddle import nn

import passl
from passl import checkpoint
from passl.config import to_yaml
from passl.convert.conversion import Conversion, Options, convert_source
from passl.convert.kept_data import SIDECAR, of_source
from passl.convert.official_run import ResumeState, resume_state
from passl.convert.report import ConversionError
from passl.convert.source import Source, open_source, stem
from passl.convert.to_torch import official_files, state_dict
from passl.formats.atomic import replacing
from passl.formats.paddle_writer import save_pdparams
from passl.formats.safetensors import save_safetensors
from passl.formats.torch_writer import save_torch

_WRITTEN_SUFFIXES = (".pth", ".pt", ".pth.tar", ".tar", ".ckpt", ".bin")
TARGETS = ("paddle", "torch", "safetensors")
RECIPE, _RECIPE_MARK = ".yaml", "# Made by passl-convert"

logger = logging.getLogger("passl")
PathLike = Union[str, Path]


class ConvertedBackbone(NamedTuple):
    """name, arguments: of a registered backbone. state: its weights, for :func:`passl.checkpoint.load_weights`.
    unknown: arguments that nothing in the file shows.
    """

    name: str
    arguments: dict[str, Any]
    state: dict[str, np.ndarray]
    unknown: tuple[str, ...] = ()


class Written(NamedTuple):
    """What :func:`convert` found and wrote; ``notes``: what the user should know of the rest."""

    conversion: Conversion
    files: list[Path]
    notes: list[str]


def convert(
    source: PathLike,
    destination: Optional[PathLike],
    to: str = "paddle",
    kind: Optional[str] = None,
    arch: Optional[str] = None,
    arguments: Optional[Mapping[str, Any]] = None,
    checkpoint_key: Optional[str] = None,
    backbone: Optional[PathLike] = None,
    allow: Sequence[str] = (),
    check: Optional[Callable[[Conversion], None]] = None,
) -> Written:
    """Convert a file of weights to Paddle's, PyTorch's or the safetensors format.

    Args:
        source: ``.pth`` (also ``.pt``, ``.pth.tar``, ``.ckpt``), ``.safetensors``, ``.pdparams``, or a prefix.
        destination: a prefix for Paddle, a file for the others, or a folder (then the source's name in it); None
            writes nothing. A whole run gets ``.pdopt``, ``.pdstates`` and a configuration ``.yaml`` too.
        to: "paddle", "torch" or "safetensors".
        kind, arch, arguments: what the file holds, where it cannot be seen in it (see KINDS).
        checkpoint_key: "teacher" or "student": only the backbone of that network of a run.
        backbone: file of the backbone below a linear classifier; together they make a whole probe.
        allow: patterns of keys that may be left over.
        check: called before anything is written, with what will be; what it raises prevents it.

    Raises:
        CheckpointFormatError, CheckpointError: a file is missing or damaged, or does not become known weights: nothing
            is written then.
    """
    if to not in TARGETS:
        raise ConversionError(f"--to ({to!r}) must be one of {', '.join(TARGETS)}")
    opened = open_source(source, bfloat16="bits")
    told = {**({} if arch else _kept_arguments(opened)), **(arguments or {})}
    options = Options(kind, arch, told, None, checkpoint_key, allow)
    below = open_source(backbone, bfloat16="bits") if backbone else None
    try:
        conversion = convert_source(opened, options, below)
        conversion.report.check(str(conversion.architecture or conversion.model))
    except ConversionError as error:
        raise ConversionError(f"{opened.path}: {error}") from None
    if check is not None:
        check(conversion)
    if destination is None:
        return Written(conversion, [], [])
    sources = [source.path for source in (opened, below) if source]
    target = _target(sources, Path(destination).expanduser(), str(destination), to)
    target.parent.mkdir(parents=True, exist_ok=True)
    write = {"paddle": _write_paddle, "torch": _write_torch, "safetensors": _write_safetensors}[to]
    files, notes = write(opened, conversion, target)
    return Written(conversion, files, notes)


def read_backbone(path: PathLike, checkpoint_key: str = "teacher") -> ConvertedBackbone:
    """The backbone in a file of any known origin (of a run: that of ``checkpoint_key``), and which one it is.

    Raises:
        CheckpointFormatError, CheckpointError: as :func:`convert`.
    """
    source = open_source(path)
    conversion = _checked(source, Options("backbone", None, _kept_arguments(source), None, checkpoint_key))
    assert conversion.architecture is not None
    found = conversion.architecture
    return ConvertedBackbone(found.name, found.arguments, conversion.state, found.unknown)


def read_weights(path: PathLike, model: nn.Layer, backbone: nn.Layer, checkpoint_key: str) -> dict[str, np.ndarray]:
    """Weights in a foreign file for ``model``: all of them where it has them, else those of its ``backbone``, by the
    backbone's own names.

    Raises:
        CheckpointFormatError: as :func:`convert`.
    """
    source = open_source(path)
    wanted = set(model.state_dict())
    try:
        whole = convert_source(source, Options(layer=backbone))
        if set(whole.state) == wanted and not whole.report.left_over:
            return _logged(path, whole)
    except ConversionError as error:
        logger.debug("%s: not all of %s (%s)", path, type(model).__name__, error)
    try:
        return _logged(path, _checked(source, Options("backbone", layer=backbone, checkpoint_key=checkpoint_key)))
    except ConversionError as error:
        raise ConversionError(f"{error}{_held_instead(source, checkpoint_key)}") from None


def _logged(path: PathLike, conversion: Conversion) -> dict[str, np.ndarray]:
    for what in conversion.fitted:
        logger.info("%s: %s", path, what)
    return conversion.state


def _held_instead(source: Source, checkpoint_key: str) -> str:
    """For the error about a file that does not fit: what it would fit."""
    try:
        found = convert_source(source, Options("backbone", checkpoint_key=checkpoint_key))
        found.report.check(str(found.architecture))
    except ConversionError:
        return ""
    return f". The file holds {found.architecture}: give Model.backbone this name and these arguments, or another file"


def _checked(source: Source, options: Options) -> Conversion:
    try:
        conversion = convert_source(source, options)
        conversion.report.check(str(conversion.architecture))
    except ConversionError as error:
        raise ConversionError(f"{source.path}: {error}") from None
    return conversion


# --- writing ---------------------------------------------------------------------------------------------------------


def _target(sources: Sequence[Path], destination: Path, text: str, to: str) -> Path:
    """Where to write: a prefix for Paddle, a file for the others."""
    suffix = {"paddle": "", "torch": ".pth", "safetensors": ".safetensors"}[to]
    if destination.is_dir() or text.endswith("/"):
        destination = destination / stem(sources[0])
    if to == "paddle":
        target = checkpoint.with_suffix(destination, "")
        _check_free(target)
        written = checkpoint.with_suffix(target, checkpoint.PARAMS)
    else:
        known = _WRITTEN_SUFFIXES if to == "torch" else (suffix,)
        target = written = destination if destination.name.endswith(known) else Path(f"{destination}{suffix}")
    if any(written.exists() and written.samefile(source) for source in sources):
        raise ConversionError(f"{written} is the source itself: give another destination")
    return target


def _check_free(prefix: Path) -> None:
    """Converted files may be written again; a run's own checkpoint and a user's configuration may not be lost."""
    states, recipe = checkpoint.with_suffix(prefix, checkpoint.STATES), Path(f"{prefix}{RECIPE}")
    if states.exists() and not checkpoint.read(states).get("converted"):
        raise ConversionError(f"{states}: a checkpoint of a run is there: give another destination")
    for path, mark in ((recipe, _RECIPE_MARK.encode()), (Path(f"{prefix}{SIDECAR}"), b'{\n "passl":')):
        if path.exists() and not (path.is_file() and path.read_bytes().startswith(mark)):
            raise ConversionError(f"{path} is there, and not of passl-convert: give another destination")


def _write_paddle(source: Source, conversion: Conversion, prefix: Path) -> tuple[list[Path], list[str]]:
    params = checkpoint.with_suffix(prefix, checkpoint.PARAMS)
    save_pdparams(conversion.state, params)
    files, notes = [params], []
    if conversion.kind == "run":
        try:
            resume = resume_state(source, conversion)
        except ConversionError as error:
            notes.append(f"the run cannot be continued from here ({error}); use it as Global.pretrained_model")
        else:
            files += _write_resume(source, resume, prefix)
            if resume.recipe:
                files.append(_write_recipe(source, resume.recipe, prefix))
            elif conversion.architecture and conversion.architecture.unknown:
                given = " ".join(f"--set {name}=VALUE" for name in conversion.architecture.unknown)
                notes.append(f"no configuration is written, as the architecture does not all show in the file: {given}")
    sidecar = Path(f"{prefix}{SIDECAR}")
    _write_text(sidecar, json.dumps(_description(source, conversion), indent=1) + "\n")
    return [*files, sidecar], notes


def _write_resume(source: Source, resume: ResumeState, prefix: Path) -> list[Path]:
    path = {s: checkpoint.with_suffix(prefix, s) for s in (checkpoint.PARAMS, checkpoint.OPTIMIZER, checkpoint.STATES)}
    save_pdparams(resume.optimizer, path[checkpoint.OPTIMIZER])
    checksums = {s: checkpoint.checksum(path[s]) for s in (checkpoint.PARAMS, checkpoint.OPTIMIZER)}
    data = of_source(source)
    known = resume.recipe or ({"Data": data} if data else None)
    config = to_yaml(known) if known else ""
    save_pdparams({**resume.states, "config": config, "checksums": checksums}, path[checkpoint.STATES])
    return [path[checkpoint.OPTIMIZER], path[checkpoint.STATES]]


def _write_recipe(source: Source, recipe: Mapping[str, Any], prefix: Path) -> Path:
    path = Path(f"{prefix}{RECIPE}")
    command = f"#   passl-train -c {path} -o Global.checkpoint={prefix}\n"
    header = f"{_RECIPE_MARK}, how the run in {source.path.name} was trained. To continue it:\n"
    _write_text(path, header + command + to_yaml(recipe))
    return path


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def _description(source: Source, conversion: Conversion) -> dict[str, Any]:
    return {
        "passl": passl.__version__,
        "source": {"name": source.path.name, "sha256": _sha256(source.path)},
        "kind": conversion.kind,
        "model": conversion.model,
        "not_visible": list(conversion.architecture.unknown) if conversion.architecture else [],
        "counters": conversion.counters,
        "report": conversion.report.as_dict(),
        **({"data": data} if (data := of_source(source)) else {}),
    }


def _write_torch(source: Source, conversion: Conversion, path: Path) -> tuple[list[Path], list[str]]:
    counters, optimizer, states, notes = _kept_counters(source), None, None, []
    if conversion.kind == "run" and source.layout == "paddle":
        prefix = checkpoint.with_suffix(source.path, "")
        try:
            states = checkpoint.read_states(prefix)
            optimizer = checkpoint.read(checkpoint.with_suffix(prefix, checkpoint.OPTIMIZER))
        except checkpoint.CheckpointError as error:
            notes.append(f"without optimizer and epoch: {error}")
    elif conversion.kind == "run":
        try:
            optimizer, states, _ = resume_state(source, conversion)
        except ConversionError as error:
            notes.append(f"without optimizer and epoch: {error}")
    files = []
    name = stem(path)
    for part, value in official_files(conversion, optimizer, states, counters).items():
        files.append(path.with_name(f"{name}{part}{path.name[len(name) :]}"))
        save_torch(value, files[-1])
    return files, notes


def _write_safetensors(source: Source, conversion: Conversion, path: Path) -> tuple[list[Path], list[str]]:
    if conversion.kind == "run":
        raise ConversionError(
            "safetensors holds one network: give --checkpoint-key teacher or student, or --to torch for the whole run"
        )
    save_safetensors(state_dict(conversion, counters=_kept_counters(source)), path, {"format": "pt"})
    return [path], []


def _kept_counters(source: Source) -> dict[str, int]:
    """Counters of batch norms that an earlier conversion left beside the weights."""
    counters = _kept(source).get("counters", {})
    return {str(name): int(value) for name, value in counters.items()}


def _kept_arguments(source: Source) -> dict[str, Any]:
    """Arguments of the architecture that no weights show, and that an earlier conversion was told."""
    model = _kept(source).get("model", {})
    section = model.get("backbone", model)
    return {key: section[key] for key in ("num_heads", "tokens_norm", "pos_embed_mode") if key in section}


def _kept(source: Source) -> dict[str, Any]:
    path = Path(f"{checkpoint.with_suffix(source.path, '')}{SIDECAR}")
    if source.layout != "paddle" or not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        valid = all(isinstance(kept.get(key, {}), dict) for key in ("counters", "model"))
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{path}: damaged ({error}); remove it to go on without what it tells") from error
    if not valid:
        raise ConversionError(f"{path}: not written by passl-convert; remove it to go on without what it tells")
    return kept


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
