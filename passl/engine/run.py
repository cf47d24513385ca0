"""From a configuration to a finished run: what ``passl-train`` and ``passl-eval`` do."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import paddle

from passl import checkpoint, distributed, log
from passl.checkpoint import CheckpointError, CheckpointStore
from passl.config import Config, ConfigError, check, to_yaml
from passl.data import file_index
from passl.data.loader import BadSamplesError
from passl.data.workers import WorkerDiedError
from passl.engine import build, data_section, start
from passl.engine.diagnosis import DiagnosisHook, record_failure
from passl.engine.early_stopping import deciding_evaluator
from passl.engine.evaluation import EarlyStoppingHook, EvaluationHook, Measuring
from passl.engine.feature_watch import KNNWatch, chosen_watch
from passl.engine.folder_lock import FolderInUseError, FolderLock
from passl.engine.guard import GuardHook
from passl.engine.hooks import CheckpointHook, LogHook
from passl.engine.interruption import Interrupted, StopSignals
from passl.engine.non_finite import NonFiniteLossError
from passl.engine.passl_config import translate
from passl.engine.plugins import load_plugins
from passl.engine.reporting import ReportHook, report_evaluation
from passl.engine.roll_back import RollBack
from passl.engine.settings import GlobalSettings, schema
from passl.engine.trainer import Hook, Trainer
from passl.evaluators import Classification, Evaluator, evaluate
from passl.models import cpu
from passl.models.method import Method
from passl.schedules import Timeline

logger = logging.getLogger("passl")


def checked(config: Config, training: bool) -> Config:
    """``config`` in passl's own form (PASSL's is translated), every section checked.

    Raises:
        ConfigError: with all problems.
    """
    load_plugins(config)
    config, problems = translate(config, training)
    try:
        check(config, schema(training))
    except ConfigError as error:
        problems += error.problems
    problems += build.path_problems(config)
    if problems:
        raise ConfigError(problems)
    build.strategy(config)
    data_section.check(config)
    return config


def train(config: Config, source: Config) -> Trainer:
    """Run a checked configuration to its end; ``source`` is what the user gave and is saved beside the results."""
    settings = build.global_settings(config)
    file_index.keep_in(_index_folder(settings))
    for key, lowest in (("epochs", 1), ("accum_steps", 1), ("max_train_step", 1), ("seed", 0)):
        value = getattr(settings, key)
        if value is not None and value < lowest:
            raise ConfigError([f"Global.{key} ({value}) must be at least {lowest}"])
    log.setup(quiet=not distributed.is_main())
    set_up(settings)
    config, source = data_section.complete(config, source, settings, _folder(config, settings))
    with _alone_in(_folder(config, settings)), StopSignals() as signals:
        trainer, back = None, None
        while trainer is None or back:
            trainer = None  # its memory is needed
            trainer, back = _attempt(config, source, settings, signals, back)
        if trainer.is_interrupted:
            # Only now: a launcher ends all processes when the first one ends. That one saves, and knows where.
            raise Interrupted(trainer.step, distributed.broadcast_object(trainer.last_checkpoint))
    return trainer


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder for this run; a problem of the process that writes is one of all."""
    with contextlib.ExitStack() as stack:
        problem = None
        if distributed.is_main():
            try:
                stack.enter_context(FolderLock(folder))
            except (FolderInUseError, OSError) as error:
                problem = error
        if distributed.broadcast_object(problem is not None):
            raise problem or FolderInUseError(f"{folder} cannot be used: see what the first process says")
        yield


def _attempt(
    config: Config, source: Config, settings: GlobalSettings, signals: StopSignals, back: Optional[RollBack]
) -> tuple[Trainer, Optional[RollBack]]:
    """Train from the start, a checkpoint, or where ``back`` leads; with why and how the run is to go on, if it is."""
    try:
        trainer, store, resumed = _prepare(config, source, settings, signals, back)
    except (ConfigError, CheckpointError):
        raise
    except ValueError as error:  # what a constructor refused
        raise ConfigError([str(error)]) from error
    # Only now: a mistake in the configuration must leave an earlier run where it was.
    _open_folder(store, source, resumed, trainer.step)
    file_index.save()
    _announce(trainer, store.folder)
    try:
        trainer.fit()
    except RollBack as error:
        logger.warning("%s: going back", error)
        return trainer, error
    except (WorkerDiedError, BadSamplesError):
        _save_steps_done(trainer)
        raise
    except NonFiniteLossError as error:
        record_failure(trainer, error)
        raise
    return trainer, None


def _save_steps_done(trainer: Trainer) -> None:
    """After an error of the data, which comes between two steps; of several processes the others are in the next."""
    if distributed.world_size() == 1 and trainer.step > 0:
        for hook in trainer.hooks:
            if isinstance(hook, CheckpointHook) and hook.save(trainer, is_best=False):
                logger.info("the steps up to %d are saved in %s", trainer.step, trainer.last_checkpoint)


def _prepare(
    config: Config, source: Config, settings: GlobalSettings, signals: StopSignals, back: Optional[RollBack]
) -> tuple[Trainer, CheckpointStore, Optional[Path]]:
    """The trainer, at the step where it is to begin, its checkpoints, and the prefix of the one it goes on from."""
    store = CheckpointStore(_folder(config, settings), settings.max_num_latest_checkpoint)
    resumed = back.prefix or store.newest_intact() if back else start.resume_prefix(settings, store)
    # The checksums of the others were compared when they were chosen.
    read = checkpoint.read_states if back and back.prefix else checkpoint.run_states
    saved = read(resumed) if resumed else {}
    progress = {**(saved.get("progress") or {}), **(back.progress if back else {})}
    precision = build.precision(config, progress.get("precision"))
    paddle.seed(settings.seed)
    method = build.model(config)
    loader = build.train_loader(config, settings.seed)
    line = build.timeline(loader, settings.epochs)
    optimizer = build.optimizer(config, method)
    build.recompute(config, method)
    evaluators = build.evaluators(config, method) if settings.eval_during_train else []
    build.check_labels(method, loader.dataset, evaluators)
    description = {
        "config": to_yaml(source),
        "world_size": distributed.world_size(),
        "length": len(loader.dataset),
        "pct": loader.sampler.pct,
    }
    hooks = _hooks(settings, line, method, evaluators, store, description, config)
    schedules = {**method.schedules(line), **build.schedules(config, line)}
    states = None
    if resumed is None:
        start.load_start(settings, method)
    else:
        identity = start.identity_of(loader, line, settings.seed)
        states = start.resume(resumed, saved, method, optimizer, identity, precision)
        start.warn_of_changes(states, source)
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
        non_finite=settings.non_finite,
        is_told_to_stop=lambda: signals.received is not None,
    )
    trainer.progress = progress
    if states:
        precision.load_state_dict(states["scaler"])
        trainer.step = states["step"]
        trainer.last_checkpoint = resumed
    return trainer, store, resumed


def _hooks(
    settings: GlobalSettings,
    line: Timeline,
    method: Method,
    evaluators: list[Evaluator],
    store: CheckpointStore,
    description: dict[str, Any],
    config: Config,
) -> list[Hook]:
    """The report, logging, evaluation and saving, in this order: what is saved knows the newest metric."""
    log_hook = LogHook(store.folder, settings.print_batch_step, settings.use_visualdl)
    save_interval = _steps(line, settings.save_interval, "epoch", "Global.save_interval")
    checkpoints = CheckpointHook(store, save_interval, description)
    measuring = functools.partial(Measuring, log=log_hook, checkpoints=checkpoints, folder=store.folder)
    hooks: list[Hook] = [log_hook]
    if settings.diagnose_every is not None:
        interval = _steps(line, settings.diagnose_every, "epoch", "Global.diagnose_every")
        hooks.append(DiagnosisHook(log_hook, interval, description["config"]))
    rule, guard, deciding, watch = settings.early_stopping, settings.guard, None, None
    if rule is not None:
        if not settings.eval_during_train:
            raise ConfigError(["Global.early_stopping: it needs evaluation: set Global.eval_during_train: true"])
        knn = deciding_evaluator(evaluators, method)
        evaluators = [evaluator for evaluator in evaluators if evaluator is not knn]
        deciding = measuring([knn])
        hooks.append(EarlyStoppingHook(rule, deciding))
    if guard is not None:
        watch, evaluators = chosen_watch(guard, evaluators, settings.eval_during_train, deciding, measuring)
    if evaluators:
        interval = _steps(line, settings.eval_interval, settings.eval_unit, "Global.eval_interval")
        decides_best = rule is None and not isinstance(watch, KNNWatch)
        hooks.append(EvaluationHook(measuring(evaluators), interval, decides_best))
    if guard is not None:
        interval = _steps(line, guard.every, "epoch", "Global.guard.every")
        decides_best = rule is None and (isinstance(watch, KNNWatch) or not evaluators)
        hooks.append(GuardHook(guard, interval, watch, log_hook, checkpoints, decides_best))
    report = [ReportHook(settings.report, config, log_hook)] if settings.report else []
    return [*report, *hooks, checkpoints]


def _folder(config: Config, settings: GlobalSettings) -> Path:
    return Path(settings.output_dir).expanduser() / (settings.name or config["Model"]["name"])


def _index_folder(settings: GlobalSettings) -> Path:
    # Beside the runs: a new one of the same name moves an old one aside.
    return Path(settings.output_dir).expanduser() / "file_index"


def evaluate_config(config: Config, source: Config) -> dict[str, float]:
    """Run the evaluators of a checked configuration on its model; writes and returns their numbers."""
    settings = build.global_settings(config)
    file_index.keep_in(_index_folder(settings))
    set_up(settings)
    folder = _folder(config, settings)
    log.setup(folder / "eval.log" if distributed.is_main() else None, quiet=not distributed.is_main())
    config, source = data_section.complete(config, source, settings, folder)
    paddle.seed(settings.seed)
    model = build.model(config)
    is_whole = start.load_given(settings, model, "evaluating")
    found = build.evaluators(config, model)
    if not found:
        raise ConfigError(["nothing to evaluate: add Evaluators (for example KNN) or DataLoader.Eval"])
    build.check_labels(model, None, found)
    for evaluator in found:
        if isinstance(evaluator, Classification):
            evaluator.writes_files = True
    file_index.save()
    started = time.perf_counter()
    results: dict[str, float] = {}
    for evaluator in found:
        if evaluator.subject == "backbones" and "student" in evaluator.models and not is_whole:
            raise CheckpointError(
                f"{settings.pretrained_model} (checkpoint_key {settings.checkpoint_key}) gives one backbone, not "
                f"teacher and student: {type(evaluator).__name__} would compare equals. Give a whole run (its latest "
                "or best) and checkpoint_key teacher, or remove student from models"
            )
        if evaluator.subject == "method" and not is_whole:
            raise CheckpointError(
                f"{settings.pretrained_model} has no weights for all of {type(model).__name__}, only a backbone: its "
                "predictions would be random. Train it with passl-train and give its latest or best"
            )
        results.update(evaluate(evaluator, model, folder))
    logger.info("[Eval] %s", ", ".join(f"{name}: {value:.5f}" for name, value in results.items()))
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "eval.json"
        # NaN, a number that could not be measured, is no JSON.
        known = {name: value if math.isfinite(value) else None for name, value in results.items()}
        target.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        (folder / "eval_config.yaml").write_text(to_yaml(source), encoding="utf-8")
        logger.info("written to %s", target)
        if settings.report:
            seconds = time.perf_counter() - started
            report_evaluation(settings.report, config, model, folder, results, seconds, settings.use_visualdl)
    return results


def set_up(settings: GlobalSettings) -> None:
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
    elif not store.is_empty():
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
    sampler = trainer.loader.sampler
    if sampler.subset is not None:
        logger.info("training on %d of %d samples (pct %g)", sampler.num_samples, sampler.length, sampler.pct)
