"""A whole run: from a configuration to a trained network, or to the accuracy of a checkpoint."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from timm.utils.random import random_seed
from torch import Tensor, nn

from ..configs.schema import Config, ConfigError
from ..datasets import (
    EvalSampler,
    Finish,
    FinishingLoader,
    Relabelled,
    TrainSampler,
    build_dataset,
    build_datasets,
    build_eval_loader,
    build_train_loader,
    viewable,
)
from ..models import build_model, load_checkpoint
from .distributed import World
from .dry_run import describe
from .evaluate import Metrics, at_size, evaluate, predict
from .keeper import Keeper
from .lock import locked
from .log import Progress, RunLog
from .outputs import check_outputs
from .report import say_corrupt, write_reports
from .resume import check_agreement, find_checkpoint, keep_total_batch, resume
from .signals import heed_signals
from .state import NonFiniteLossError, Training
from .terminal import say
from .train import train_epoch
from .tuning import tune_for

TrainLoader = FinishingLoader[TrainSampler]
EvalLoader = FinishingLoader[EvalSampler]


def evaluate_run(config: Config, world: World) -> Metrics:
    """Evaluate the weights in `resume`, or timm's pretrained ones, and print the result.

    With an `output_dir`, eval.json keeps it; of several sizes, the last.

    Raises:
        ConfigError: Neither is given, the data cannot be read, or a file cannot be written.
        CheckpointError: The checkpoint cannot be used.
        SaveError: A file that could be written before cannot be any more.
    """
    run = config.run
    if not run.resume and not config.model.pretrained:
        raise ConfigError("field 'resume': nothing to evaluate; pass --resume CHECKPOINT, or --pretrained true")
    check_outputs(run, world)
    sizes = run.eval_sizes or (config.model.input_size,)
    configs = {size: replace(config, model=replace(config.model, input_size=size)) for size in sizes}
    loaders = {size: _eval_loader(sized, world) for size, sized in configs.items()}
    model = _build(config)
    if run.resume:
        load_checkpoint(model, run.resume, run.model_key)
    model = model.to(world.device)
    if run.channels_last:
        model = model.to(memory_format=torch.channels_last)
    with RunLog(run, world) as log:
        return [_evaluate_size(model, configs[size], loader, world, log) for size, loader in loaders.items()][-1]


def _evaluate_size(model: nn.Module, config: Config, loader: EvalLoader, world: World, log: RunLog) -> Metrics:
    """Evaluate `model` on images of one size; print and write the result."""
    run, size, parameters = config.run, config.model.input_size, parameter_count(model)
    network = at_size(model, size)
    if run.tune:
        tune_for(network, config, world, training=False)
    metrics, predictions = predict(network, loader, run, world)
    rate = metrics.images / metrics.seconds
    fields = {"checkpoint": run.resume, "n_parameters": parameters, "images_per_second": rate, "input_size": size}
    log.keep("eval.json", {**fields, **vars(metrics)})
    left_out = f", {metrics.unlabelled} left out without a label" if metrics.unlabelled else ""
    log.say(
        f"{config.model.model}: {parameters:,} parameters, {metrics.images} images of {size} pixels{left_out}, "
        f"{rate:.0f} images/s"
    )
    log.say(str(metrics))
    say_corrupt(loader.dataset, world, log)
    if world.is_main:
        write_reports(run, loader.dataset, predictions)
    return metrics


def train_run(config: Config, world: World) -> Training:
    """Train as `config` says, from the newest checkpoint in `output_dir` if there is one.

    Raises:
        ConfigError: The data, the model and the recipe do not go together, or a folder cannot be written, is in use, or
            holds another training; before the first step.
        CheckpointError: A checkpoint to start from cannot be used.
        SaveError: A checkpoint or the log cannot be written.
        NonFiniteLossError: The training diverged.
        Interrupted: A signal told it to end; its state is saved where checkpoints are kept.
    """
    check_outputs(config.run, world)
    with heed_signals() as notice, locked(config.run.output_dir, world, notice):
        training, train_loader, eval_loader, path = _prepare(config, world)
        with RunLog(config.run, world) as log:
            log.keep("config.json", training.config.to_fields())
            log.say(
                f"{config.model.model}: {parameter_count(training.model):,} parameters, {len(train_loader.dataset)} "
                f"images to train and {len(eval_loader.dataset) if eval_loader else 0} to evaluate, on {world.size} × "
                f"{world.device.type}"
            )
            if path:
                log.say(
                    f"continuing from {path}: {training.epoch} of {config.run.epochs} epochs and {training.iteration} "
                    f"of the next one's {len(train_loader)} iterations are done"
                )
            log.start(training.epoch)
            fit(training, train_loader, eval_loader, log, Keeper(training, notice, path))
        for loader in filter(None, (train_loader, eval_loader)):
            say_corrupt(loader.dataset, world, log)
    return training


def dry_run(config: Config, world: World) -> None:
    """Print what training as `config` says would be, with estimates of its memory and time; write nothing.

    Raises:
        ConfigError, CheckpointError: As `train_run`.
    """
    training, *_ = _prepare(config, world)
    text = describe(training)
    if world.is_main:
        say(text)


def _prepare(config: Config, world: World) -> tuple[Training, TrainLoader, EvalLoader | None, Path | None]:
    """Make all that a training needs, where a checkpoint left it; also return that checkpoint's path."""
    found = find_checkpoint(config.run)
    if found:
        config = keep_total_batch(config, found.state, world)
    run = config.run
    train_set, eval_set = (build_dataset(config, train=True), None) if run.disable_eval else build_datasets(config)
    finish = Finish(config, world.device)
    train_loader = build_train_loader(train_set, run, world.rank, world.size, finish)
    eval_loader = build_eval_loader(eval_set, run, world.rank, world.size, finish) if eval_set else None
    random_seed(run.seed, world.rank)
    model = _build(config)
    if run.finetune:
        load_checkpoint(model, run.finetune, run.model_key, allow_new_head=True)
    training = Training.build(model.to(world.device), config, world, len(train_loader))
    if found:
        found = resume(training, found)
    path = found.path if found else None
    check_agreement(training, path)
    if run.tune:
        tune_for(training.model, config, world, training=True)
        if eval_loader:
            tune_for(training.model, config, world, training=False)
    return training, train_loader, eval_loader, path


def fit(
    training: Training, train_loader: TrainLoader, eval_loader: EvalLoader | None, log: RunLog, keeper: Keeper
) -> None:
    """Train the epochs that are left; evaluate (where there is a loader for it), record and save after each."""
    run, world, schedule = training.run, training.world, training.schedule
    while training.epoch < run.epochs:
        epoch = training.epoch
        was_annealing = schedule.anneals_at(epoch * schedule.iterations_per_epoch)
        training.begin_epoch()
        batch, done = run.batch_size * world.size, training.iteration
        see = partial(_show_inputs, training, log) if log.events and run.log_images else None
        try:
            with Progress(f"epoch {epoch}", len(train_loader), batch, log.visible, done, see) as progress:
                figures = train_epoch(training, train_loader, progress, keeper)
            training.end_epoch()
            training.set_temperature()
            if was_annealing and not schedule.anneals_at(training.iterations):
                training.best.clear()  # accuracies at a temperature that the trained network does not have
            record = {"epoch": epoch, "n_parameters": parameter_count(training.model)}
            record |= {f"train_{name}": value for name, value in figures.items()}
            improved = evaluate_epoch(training, eval_loader, record) if eval_loader else []
            log.epoch(record)
            log.say(_summary(record, run.epochs))
            keeper.epoch_done(improved)
        except NonFiniteLossError as e:
            newest = f"the last good checkpoint is {keeper.newest}" if keeper.newest else "there is no checkpoint yet"
            raise NonFiniteLossError(f"{e}; {newest}") from e


def evaluate_epoch(training: Training, loader: EvalLoader, record: dict[str, float]) -> list[str]:
    """Evaluate the model, and its moving average if that is asked for; return which of them are better than ever."""
    models: dict[str, nn.Module] = {"model": training.model}
    if training.ema is not None and training.run.model_ema_eval:
        models["model_ema"] = training.ema.module
    improved = []
    for key, model in models.items():
        training.world.share_buffers(model)
        metrics = evaluate(model, loader, training.run, training.world)
        suffix = key.removeprefix("model")
        record |= {f"test_{name}{suffix}": getattr(metrics, name) for name in ("acc1", "acc5", "loss")}
        if metrics.acc1 > training.best.get(key, -1.0):
            training.best[key] = metrics.acc1
            improved.append(key)
    return improved


def _show_inputs(training: Training, log: RunLog, images: Tensor) -> None:
    log.images(training.epoch, viewable(images, training.config))


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _eval_loader(config: Config, world: World) -> EvalLoader:
    dataset = build_dataset(config, train=False)
    if config.run.eval_labels:
        dataset = Relabelled(dataset, config.run.eval_labels)
    return build_eval_loader(dataset, config.run, world.rank, world.size, Finish(config, world.device))


def _build(config: Config) -> nn.Module:
    try:
        return build_model(config.model)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _summary(record: dict[str, float], epochs: int) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name.startswith(("train_", "test_")))
    return f"epoch {record['epoch'] + 1}/{epochs}: {figures}"
