"""Where a run begins: a checkpoint that it resumes, else pre-trained weights, else scratch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from paddle import nn

from passl import checkpoint, convert, distributed
from passl.checkpoint import CheckpointError, CheckpointStore
from passl.config import Config
from passl.data.loader import Loader
from passl.engine.optim import Optimizer
from passl.engine.precision import Precision, in_full_precision
from passl.engine.settings import GlobalSettings
from passl.models.channels import inflate_state
from passl.models.method import Method
from passl.models.positions import resize_positions
from passl.schedules import Timeline
from passl.yaml_io import parse

logger = logging.getLogger("passl")

_MAY_DIFFER = {
    f"Global.{key}" for key in ("checkpoint", "pretrained_model", "output_dir", "name", "max_train_step", "report")
}


def load_start(settings: GlobalSettings, method: Method) -> None:
    """Pre-trained weights, or scratch."""
    if settings.pretrained_model:
        load_pretrained(settings, method, other_heads=True)
    elif method.needs_pretrained:
        logger.warning(
            "Global.pretrained_model is not given: %s trains on an untrained backbone", type(method).__name__
        )


def load_given(settings: GlobalSettings, model: nn.Layer, doing: str) -> bool:
    """Pre-trained weights for a model that is used as it is; False if they are those of its backbone alone."""
    if settings.pretrained_model:
        return load_pretrained(settings, model)
    logger.warning("Global.pretrained_model is not given: %s an untrained %s", doing, type(model).__name__)
    return True


def identity_of(loader: Loader, line: Timeline, seed: int) -> dict[str, float]:
    """What must be the same for a run to be the same: with another value its batches are others."""
    return {
        "pct": loader.sampler.pct,  # first, as it explains the next one
        "steps_per_epoch": line.steps_per_epoch,
        "global_batch_size": line.global_batch_size,
        "length": len(loader.dataset),
        "seed": seed,
    }


def resume(
    prefix: Path,
    saved: Mapping[str, Any],
    method: Method,
    optimizer: Optimizer,
    identity: Mapping[str, float],
    precision: Precision,
) -> dict[str, Any]:
    """Method and optimizer as they were saved under ``prefix`` together with the states ``saved``; returns these as
    those of this run.
    """
    states = {"pct": 1.0, **saved}  # passl once had no shares
    if states.get("converted"):
        states = _at_epoch_start(prefix, states, identity)
    unknown = [key for key in (*identity, "epoch", "scaler", "progress", "config") if key not in states]
    if unknown:
        raise CheckpointError(f"{prefix}{checkpoint.STATES}: not of a passl run: it has no {', '.join(unknown)}")
    for key, value in identity.items():
        if states[key] != value:
            raise CheckpointError(
                f"{prefix}: saved with {key} {states[key]}, this run has {value}: it would not be the same run. "
                f"{_remedy(states, identity)}, or start anew with -o Global.pretrained_model={prefix} and "
                "-o Global.checkpoint=null"
            )
    weights = checkpoint.read_weights(prefix)
    moments = checkpoint.read(checkpoint.with_suffix(prefix, checkpoint.OPTIMIZER))
    if precision.level != "O2":
        weights, moments = in_full_precision(weights, moments)
    checkpoint.load_weights(method, weights, f"{prefix}{checkpoint.PARAMS}")
    optimizer.load_state_dict(moments)
    logger.info("resuming %s at step %d (epoch %d)", prefix, states["step"], states["epoch"] + 1)
    return states


def _remedy(states: Mapping[str, Any], identity: Mapping[str, float]) -> str:
    """What to type. On other processes a run is the same, in the same order, while they share the same batches."""
    processes, batch = distributed.world_size(), states["global_batch_size"]
    is_only_shared_out = all(states[key] == identity[key] for key in ("pct", "length", "seed"))
    if batch != identity["global_batch_size"] and batch % processes == 0 and is_only_shared_out:
        return (
            f"It took {batch} images per step on {states.get('world_size', 'other')} process(es): on {processes}, go "
            f"on with -o DataLoader.Train.sampler.batch_size={batch // processes}"
        )
    return "Use the same data, share of it (pct), batch, processes and seed"


def _at_epoch_start(prefix: Path, states: Mapping[str, Any], identity: Mapping[str, float]) -> dict[str, Any]:
    """The states of an official run, which counts epochs and keeps neither its data nor its seed, as of this run."""
    step = states["epoch"] * identity["steps_per_epoch"]
    if states["step"] not in (0, step):  # 0: its optimizer counts no steps
        logger.warning(
            "%s: the official run took %d steps in %d epochs, here they are %d: data or batch are not the same, and "
            "the schedules follow the epochs",
            prefix,
            states["step"],
            states["epoch"],
            step,
        )
    return {**states, **identity, "step": step}


def warn_of_changes(states: Mapping[str, Any], source: Config) -> None:
    before = parse(states["config"], "the checkpoint's configuration") if states["config"] else {}
    if states.get("converted"):  # its configuration says only what the official arguments do
        source = Config(_restricted(source, before), {})
    changed = differences(before, source)
    if changed:
        logger.warning("the configuration differs from that of the checkpoint: %s", "; ".join(changed))


def _restricted(config: Any, keys: Any) -> Any:
    """``config`` without the keys that ``keys`` does not have."""
    if not isinstance(config, Mapping) or not isinstance(keys, Mapping):
        return config
    return {key: _restricted(value, keys[key]) for key, value in config.items() if key in keys}


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """``a.b: old -> new`` for every value that differs, apart from what says where a run begins, ends and is kept."""
    if key in _MAY_DIFFER:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = list(dict.fromkeys([*old, *new]))
        parts = [differences(old.get(n), new.get(n), f"{key}.{n}".lstrip(".")) for n in names]
        return [line for part in parts for line in part]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


def resume_prefix(settings: GlobalSettings, store: CheckpointStore) -> Optional[Path]:
    if settings.checkpoint is None:
        return None
    if settings.checkpoint == "auto":
        prefix = store.newest_intact()
        if prefix is None:
            logger.info("Global.checkpoint=auto: no checkpoint in %s, starting anew", store.folder)
        return prefix
    if settings.checkpoint.endswith(convert.TORCH_SUFFIXES):
        raise CheckpointError(
            f"{settings.checkpoint}: a file of PyTorch. Convert it (passl-convert {settings.checkpoint} PREFIX) and "
            "continue that run with -o Global.checkpoint=PREFIX"
        )
    prefix = checkpoint.with_suffix(settings.checkpoint, "")
    try:
        checkpoint.read_states(prefix)
    except CheckpointError as error:
        # A crash between two renames leaves `latest` mixed; the set that it was to point at is still there.
        whole = (
            CheckpointStore(prefix.parent).newest_intact()
            if prefix.name == "latest" and prefix.parent.is_dir()
            else None
        )
        if whole is None:
            raise
        logger.warning("%s; falling back to %s", error, whole)
        return whole
    return prefix


def load_pretrained(settings: GlobalSettings, model: nn.Layer, other_heads: bool = False) -> bool:
    """Weights of a whole method, of a backbone, or of a run that holds one, into ``model``; True for a whole method.

    other_heads: of a whole method whose heads have other shapes than those of ``model`` the backbone is taken.
    """
    source, state = _read_pretrained(settings, model)
    wants_student = settings.checkpoint_key == "student" and any(key.startswith("student.") for key in state)
    is_whole = isinstance(model, Method) and set(state) == set(model.state_dict()) and not wants_student
    misfit = _misfit_beside_backbones(state, model) if is_whole and other_heads else ""
    if is_whole and not misfit:
        layers = [model]
    else:
        own, state = len(state), checkpoint.backbone_state(state, settings.checkpoint_key)
        layers = model.pretrained_layers() if isinstance(model, Method) else [model]
        what = f"the {settings.checkpoint_key}'s backbone of it" if own > len(state) else "a backbone"
    shapes = {name: one.shape for name, one in layers[0].state_dict().items()}
    state, inflated = inflate_state(state, shapes)
    state, resized = resize_positions(state, layers[0])
    for done in (*inflated, *resized):
        logger.info("%s: %s", source, done)
    for layer in layers:
        report = checkpoint.load_weights(layer, state, source)
    logger.info("%s: %s", source, report)
    if isinstance(model, Method):
        name = type(model).__name__
        if layers == [model]:
            logger.info("%s: a whole %s: what stands on the backbone, its heads, comes along", source, name)
        else:
            reason = f" ({misfit})" if misfit else ""
            logger.info("%s: %s, for %s; its heads begin anew%s", source, what, name, reason)
    return is_whole and not misfit


def _misfit_beside_backbones(state: Mapping[str, Any], model: Method) -> str:
    """The first array of a whole method that has another shape in ``model``, in none of its backbones; or nothing."""
    backbones = [id(layer) for layer in model.pretrained_layers()]
    below = tuple(f"{prefix}." for prefix, layer in model.named_sublayers() if id(layer) in backbones)
    for name, target in model.state_dict().items():
        found, wanted = list(state[name].shape), list(target.shape)
        if found != wanted and not name.startswith(below):
            return f"{name} is {found} in the file and {wanted} here"
    return ""


def _read_pretrained(settings: GlobalSettings, model: nn.Layer) -> tuple[Path, dict[str, Any]]:
    """The file that ``Global.pretrained_model`` means, and its weights by passl's names."""
    source = checkpoint.with_suffix(settings.pretrained_model, checkpoint.PARAMS)
    if source.is_file():
        return source, checkpoint.read_weights(source)
    try:
        source = convert.find_file(settings.pretrained_model)
        backbone = model.backbone if isinstance(model, Method) else model
        return source, convert.read_weights(source, model, backbone, settings.checkpoint_key)
    except convert.CheckpointFormatError as error:
        raise CheckpointError(str(error)) from error
