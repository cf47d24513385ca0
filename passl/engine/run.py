"""From a configuration to a finished run: what ``passl-train`` and ``passl-eval`` do."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import paddle
from paddle import nn

from passl import checkpoint, distributed, log
from passl.checkpoint import CheckpointError, CheckpointStore
from passl.config import Config, ConfigError, check, to_yaml
from passl.data.loader import Loader
from passl.engine import build
from passl.engine.hooks import CheckpointHook, EvaluationHook, LogHook
from passl.engine.optim import Optimizer
from passl.engine.passl_config import translate
from passl.engine.settings import GlobalSettings, schema
from passl.engine.trainer import Hook, Trainer
from passl.evaluators import Evaluator, evaluate
from passl.models import cpu
from passl.models.method import Method
from passl.schedules import Timeline
from passl.yaml_io import parse

logger = logging.getLogger("passl")

_MAY_DIFFER = {f"Global.{key}" for key in ("checkpoint", "pretrained_model", "output_dir", "name", "max_train_step")}


def checked(config: Config, training: bool) -> Config:
    """``config`` in passl's own form (PASSL's is translated), every section checked.

    Raises:
        ConfigError: with all problems.
    """
    config, problems = translate(config, training)
    try:
        check(config, schema(training))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config


def train(config: Config, source: Config) -> Trainer:
    """Run a checked configuration to its end; ``source`` is what the user gave and is saved beside the results."""
    settings = build.global_settings(config)
    for key, lowest in (("epochs", 1), ("accum_steps", 1), ("max_train_step", 1), ("seed", 0)):
        value = getattr(settings, key)
        if value is not None and value < lowest:
            raise ConfigError([f"Global.{key} ({value}) must be at least {lowest}"])
    log.setup(quiet=not distributed.is_main())
    start(settings)
    try:
        trainer, store, resumed = _prepare(config, source, settings)
    except (ConfigError, CheckpointError):
        raise
    except ValueError as error:  # what a constructor refused
        raise ConfigError([str(error)]) from error
    # Only now: a mistake in the configuration must leave an earlier run where it was.
    _open_folder(store, source, resumed, trainer.step)
    _announce(trainer, store.folder)
    trainer.fit()
    return trainer


def _prepare(
    config: Config, source: Config, settings: GlobalSettings
) -> tuple[Trainer, CheckpointStore, Optional[Path]]:
    """The trainer, at the step where it is to begin, its checkpoints, and the prefix of the one it goes on from."""
    precision = build.precision(config)
    paddle.seed(settings.seed)
    method = build.model(config)
    loader = build.train_loader(config, settings.seed)
    line = build.timeline(loader, settings.epochs)
    optimizer = build.optimizer(config, method)
    evaluators = build.evaluators(config, method) if settings.eval_during_train else []
    build.check_labels(method, loader.dataset, evaluators)
    store = CheckpointStore(_folder(config, settings), settings.max_num_latest_checkpoint)
    description = {
        "config": to_yaml(source),
        "world_size": distributed.world_size(),
        "length": len(loader.dataset),
    }
    hooks = _hooks(settings, line, evaluators, store, description)
    schedules = build.schedules(config, line)
    resumed = _resume_prefix(settings, store)
    states = None
    if resumed is None:
        _load_start(settings, method)
    else:
        states = _resume(resumed, method, optimizer, _identity(loader, line, settings.seed))
        _warn_of_changes(states, source)
    starts = distributed.gather_objects(states["step"] if states else 0)
    if len(set(starts)) > 1:
        raise CheckpointError(f"processes would go on at steps {starts}: all nodes must share {store.folder}")
    # Before the trainer, which wraps the method for several processes: types must be final by then.
    precision.prepare(method.half_precision_layers())
    trainer = Trainer(
        method,
        optimizer,
        loader,
        schedules,
        line,
        accum_steps=settings.accum_steps,
        precision=precision,
        hooks=hooks,
        stop_step=settings.max_train_step,
        seed=settings.seed,
    )
    if states:
        precision.load_state_dict(states["scaler"])
        trainer.step = states["step"]
        trainer.progress = dict(states["progress"])
    return trainer, store, resumed


def _hooks(
    settings: GlobalSettings,
    line: Timeline,
    evaluators: list[Evaluator],
    store: CheckpointStore,
    description: dict[str, Any],
) -> list[Hook]:
    """Logging, evaluation and saving, in this order: what is saved knows the newest metric."""
    log_hook = LogHook(store.folder, settings.print_batch_step, settings.use_visualdl)
    save_interval = _steps(line, settings.save_interval, "epoch", "Global.save_interval")
    checkpoints = CheckpointHook(store, save_interval, description)
    if not evaluators:
        return [log_hook, checkpoints]
    interval = _steps(line, settings.eval_interval, settings.eval_unit, "Global.eval_interval")
    return [log_hook, EvaluationHook(evaluators, interval, log_hook, checkpoints, store.folder), checkpoints]


def _folder(config: Config, settings: GlobalSettings) -> Path:
    return Path(settings.output_dir).expanduser() / (settings.name or config["Model"]["name"])


def evaluate_config(config: Config, source: Config) -> dict[str, float]:
    """Run the evaluators of a checked configuration on its model; writes and returns their numbers."""
    settings = build.global_settings(config)
    start(settings)
    folder = _folder(config, settings)
    log.setup(folder / "eval.log" if distributed.is_main() else None, quiet=not distributed.is_main())
    paddle.seed(settings.seed)
    model = build.model(config)
    is_whole = True
    if settings.pretrained_model:
        is_whole = load_pretrained(settings, model)
    else:
        logger.warning("Global.pretrained_model is not given: evaluating an untrained %s", type(model).__name__)
    found = build.evaluators(config, model)
    if not found:
        raise ConfigError(["nothing to evaluate: add Evaluators (for example KNN) or DataLoader.Eval"])
    build.check_labels(model, None, found)
    results: dict[str, float] = {}
    for evaluator in found:
        if evaluator.subject == "method" and not is_whole:
            raise CheckpointError(
                f"{settings.pretrained_model} has no weights for all of {type(model).__name__}, only a backbone: its "
                "predictions would be random. Train it with passl-train and give its latest or best"
            )
        try:
            results.update(evaluate(evaluator, model, folder))
        except ValueError as error:  # data or weights that it cannot measure
            raise CheckpointError(f"{type(evaluator).__name__}: {error}") from error
    logger.info("[Eval] %s", ", ".join(f"{name}: {value:.5f}" for name, value in results.items()))
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "eval.json"
        target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / "eval_config.yaml").write_text(to_yaml(source), encoding="utf-8")
        logger.info("written to %s", target)
    return results


def start(settings: GlobalSettings) -> None:
    """Device, flags and process group, before the first tensor."""
    gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    device = settings.device
    if device == "auto":
        device = "gpu" if gpu else "cpu"
    if device.startswith("gpu") and not gpu:
        raise ConfigError([f"Global.device={settings.device}: this Paddle finds no GPU. Use -o Global.device=cpu"])
    try:
        # Under the launcher each process has its own GPU, and "gpu" means that one.
        paddle.set_device(device)
        if device == "cpu":
            cpu.tune()
    except ValueError as error:
        raise ConfigError([f"Global.device: {error}"]) from error
    for name, value in settings.flags.items():
        _set_flag(name, value)
    distributed.init()


def _set_flag(name: str, value: Any) -> None:
    try:
        paddle.set_flags({name: value})
    except (ValueError, RuntimeError, TypeError) as error:
        if name.startswith(("FLAGS_cudnn", "FLAGS_cublas", "FLAGS_gpu")) and not paddle.is_compiled_with_cuda():
            logger.warning("Global.flags.%s: only GPU builds of Paddle have it, ignored", name)
            return
        reason = str(error).splitlines()[0]
        raise ConfigError([f"Global.flags.{name}={value!r}: this Paddle refuses it ({reason})"]) from error


def _load_start(settings: GlobalSettings, method: Method) -> None:
    """Pre-trained weights, or scratch."""
    if settings.pretrained_model:
        load_pretrained(settings, method)
    elif method.needs_pretrained:
        logger.warning(
            "Global.pretrained_model is not given: %s trains on an untrained backbone", type(method).__name__
        )


def _identity(loader: Loader, line: Timeline, seed: int) -> dict[str, int]:
    """What must be the same for a run to be the same: with another value its batches are others."""
    return {
        "steps_per_epoch": line.steps_per_epoch,
        "global_batch_size": line.global_batch_size,
        "length": len(loader.dataset),
        "seed": seed,
    }


def _resume(prefix: Path, method: Method, optimizer: Optimizer, identity: Mapping[str, int]) -> dict[str, Any]:
    """Method and optimizer as they were saved under ``prefix``; returns the states saved with them."""
    states = checkpoint.read_states(prefix)
    unknown = [key for key in (*identity, "epoch", "scaler", "progress", "config") if key not in states]
    if unknown:
        raise CheckpointError(f"{prefix}{checkpoint.STATES}: not of a passl run: it has no {', '.join(unknown)}")
    for key, value in identity.items():
        if states[key] != value:
            raise CheckpointError(
                f"{prefix}: saved with {key} {states[key]}, this run has {value}: it would not be the same run. "
                "Use the same data, batch, processes and seed, or start anew with -o Global.pretrained_model="
                f"{prefix} and -o Global.checkpoint=null"
            )
    checkpoint.load_weights(method, checkpoint.read_weights(prefix), f"{prefix}{checkpoint.PARAMS}")
    optimizer.load_state_dict(checkpoint.read(checkpoint.with_suffix(prefix, checkpoint.OPTIMIZER)))
    logger.info("resuming %s at step %d (epoch %d)", prefix, states["step"], states["epoch"] + 1)
    return states


def _warn_of_changes(states: Mapping[str, Any], source: Config) -> None:
    changed = differences(parse(states["config"], "the checkpoint's configuration"), source)
    if changed:
        logger.warning("the configuration differs from that of the checkpoint: %s", "; ".join(changed))


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """``a.b: old -> new`` for every value that differs, apart from what says where a run begins, ends and is kept."""
    if key in _MAY_DIFFER:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = list(dict.fromkeys([*old, *new]))
        parts = [differences(old.get(n), new.get(n), f"{key}.{n}".lstrip(".")) for n in names]
        return [line for part in parts for line in part]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


def _resume_prefix(settings: GlobalSettings, store: CheckpointStore) -> Optional[Path]:
    if settings.checkpoint is None:
        return None
    if settings.checkpoint == "auto":
        prefix = store.newest_intact()
        if prefix is None:
            logger.info("Global.checkpoint=auto: no checkpoint in %s, starting anew", store.folder)
        return prefix
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


def load_pretrained(settings: GlobalSettings, model: nn.Layer) -> bool:
    """Weights of a whole method, of a backbone, or of a run that holds one, into ``model``; True for a whole method."""
    source = checkpoint.with_suffix(settings.pretrained_model, checkpoint.PARAMS)
    state = checkpoint.read_weights(source)
    wants_student = settings.checkpoint_key == "student" and any(key.startswith("student.") for key in state)
    is_whole = isinstance(model, Method) and set(state) == set(model.state_dict()) and not wants_student
    if is_whole:
        report = checkpoint.load_weights(model, state, source)
    else:
        state = checkpoint.backbone_state(state, settings.checkpoint_key)
        for layer in model.pretrained_layers() if isinstance(model, Method) else [model]:
            report = checkpoint.load_weights(layer, state, source)
    logger.info("%s: %s", source, report)
    return is_whole


def _open_folder(store: CheckpointStore, source: Config, resumed: Optional[Path], step: int) -> None:
    """Make the run's folder. What this run does not go on from (another run's files, or later steps than ``step`` of
    the checkpoint ``resumed``) is moved aside, not overwritten.
    """
    if not distributed.is_main():
        return
    folder = store.folder
    moved = []
    if resumed is not None and resumed.parent.resolve() == folder.resolve():
        if aside := store.set_aside(after_step=step):
            moved.append(f"{folder} held later steps than {step}: moved to {aside}")
    elif any(folder.glob(f"*{checkpoint.PARAMS}")):
        aside = checkpoint.unused_name(folder.with_name(f"{folder.name}.old"))
        folder.rename(aside)
        moved.append(
            f"{folder} held another run: moved to {aside} (-o Global.checkpoint=auto would have resumed that one)"
        )
    log.setup(folder / "train.log")
    for message in moved:
        logger.warning(message)
    (folder / "config.yaml").write_text(to_yaml(source), encoding="utf-8")


def _steps(line: Timeline, interval: Any, unit: str, where: str) -> int:
    """Optimizer steps in an interval; a bare number counts ``unit``."""
    if unit == "step" and not isinstance(interval, str):
        interval = f"{interval}it"
    try:
        steps = line.steps(interval)
    except ValueError as error:
        raise ConfigError([f"{where}: {error}"]) from error
    if steps < 1:
        raise ConfigError([f"{where} ({interval}): shorter than one step"])
    return steps


def _announce(trainer: Trainer, folder: Path) -> None:
    method = trainer.method
    trainable = sum(p.size for p in method.parameters() if not p.stop_gradient)
    line = trainer.timeline
    logger.info(
        "%s: %.2f M trainable parameters; %d images per step on %d process(es), %d steps per epoch, steps %d to %d; "
        "%s; results in %s",
        type(method).__name__, trainable / 1e6, line.global_batch_size, distributed.world_size(),
        line.steps_per_epoch, trainer.step, trainer.stop_step, paddle.get_device(), folder,
    )  # fmt: skip
