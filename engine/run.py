"""A whole run: from a configuration to a trained network, or to the accuracy of a checkpoint."""

from pathlib import Path

import numpy as np
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

from kernelwarehouse.datasets import build_dataset, build_datasets, build_eval_loader, build_train_loader
from kernelwarehouse.models import CheckpointError, build_model, load_checkpoint, read_checkpoint, set_temperature
from kernelwarehouse.schema import Config, ConfigError

from .checkpoint import newest_checkpoint, prune_checkpoints, read_state, save_checkpoint
from .distributed import World
from .evaluate import Metrics, evaluate
from .log import Progress, RunLog
from .state import Training
from .train import train_epoch

BEST = {"model": "checkpoint-best.pth", "model_ema": "checkpoint-best-ema.pth"}


def evaluate_run(config: Config, world: World) -> Metrics:
    """Evaluate the weights in `resume`, or timm's pretrained ones, and print the result.

    With an `output_dir`, eval.json keeps it.

    Raises:
        ConfigError: Neither is given, or the data cannot be read.
        CheckpointError: The checkpoint cannot be used.
    """
    run = config.run
    if not run.resume and not config.model.pretrained:
        raise ConfigError("field 'resume': nothing to evaluate; pass --resume CHECKPOINT, or --pretrained true")
    loader = build_eval_loader(build_dataset(config, train=False), run, world.rank, world.size)
    model = _build(config)
    if run.resume:
        load_checkpoint(model, run.resume, run.model_key)
        # Ours say at which temperature the weights were trained last; every other file is taken as trained to the end.
        set_temperature(model, read_checkpoint(run.resume).get("temperature", 0.0))
    metrics = evaluate(model.to(world.device), loader, run, world)
    rate, size = metrics.images / metrics.seconds, parameter_count(model)
    kept = {"checkpoint": run.resume, "n_parameters": size, "images_per_second": rate, **vars(metrics)}
    with RunLog(run, world) as log:
        log.keep("eval.json", kept)
        log.say(f"{config.model.model}: {size:,} parameters, {metrics.images} images at {rate:.0f} images/s")
        log.say(str(metrics))
    return metrics


def train_run(config: Config, world: World) -> Training:
    """Train as `config` says, from the newest checkpoint in `output_dir` if there is one.

    Raises:
        ConfigError: The data, the model and the recipe do not go together; before the first step.
        CheckpointError: A checkpoint to start from cannot be used.
        NonFiniteLossError: The training diverged.
    """
    run = config.run
    train_set, eval_set = (build_dataset(config, train=True), None) if run.disable_eval else build_datasets(config)
    train_loader = build_train_loader(train_set, run, world.rank, world.size)
    eval_loader = build_eval_loader(eval_set, run, world.rank, world.size) if eval_set else None
    random_seed(run.seed, world.rank)
    model = _build(config)
    if run.finetune:
        load_checkpoint(model, run.finetune, run.model_key, allow_new_head=True)
    training = Training.build(model.to(world.device), config, world, len(train_loader))
    with RunLog(run, world) as log:
        log.keep("config.json", config.to_fields())
        log.say(
            f"{config.model.model}: {parameter_count(model):,} parameters, {len(train_set)} images to train and "
            f"{len(eval_set) if eval_set else 0} to evaluate, on {world.size} × {world.device.type}"
        )
        resume(training, log)
        fit(training, train_loader, eval_loader, log)
    return training


def resume(training: Training, log: RunLog) -> None:
    """Continue from the checkpoint that the run names, or from the newest in its folder."""
    run = training.run
    found = None
    if run.resume:
        found = Path(run.resume), read_state(run.resume)
    elif run.auto_resume and run.output_dir:
        found = newest_checkpoint(run.output_dir)
    if found:
        path, state = found
        try:
            training.load_state_dict(state)
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from e
        log.say(f"continuing from {path}: {training.epoch} of {run.epochs} epochs are done")


def fit(training: Training, train_loader: DataLoader, eval_loader: DataLoader | None, log: RunLog) -> None:
    """Train the epochs that are left; evaluate (where there is a loader for it), record and save after each."""
    run, world = training.run, training.world
    while training.epoch < run.epochs:
        epoch, was_annealing = training.epoch, training.temperature > 0
        random_seed(_epoch_seed(run.seed, epoch, world.rank))
        with Progress(f"epoch {epoch}", len(train_loader), run.batch_size * world.size, log.visible) as progress:
            figures = train_epoch(training, train_loader, progress)
        training.set_temperature()
        if was_annealing and training.temperature == 0:
            training.best.clear()  # accuracies at a temperature that the trained network does not have
        record = {"epoch": epoch, "n_parameters": parameter_count(training.model)}
        record |= {f"train_{name}": value for name, value in figures.items()}
        improved = evaluate_epoch(training, eval_loader, record) if eval_loader else []
        log.epoch(record)
        log.say(_summary(record, run.epochs))
        if world.is_main and run.output_dir and run.save_ckpt:
            save_epoch(training, improved)


def evaluate_epoch(training: Training, loader: DataLoader, record: dict[str, float]) -> list[str]:
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


def save_epoch(training: Training, improved: list[str]) -> None:
    """Save the epoch just done: as the best of its kind, and by its number when that is due."""
    run, folder = training.run, Path(training.run.output_dir)
    state = training.state_dict()
    if training.epoch % run.save_ckpt_freq == 0 or training.epoch == run.epochs:
        save_checkpoint(folder / f"checkpoint-{training.epoch - 1}.pth", state)
        prune_checkpoints(folder, run.save_ckpt_num)
    for key in improved:
        save_checkpoint(folder / BEST[key], state)


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _build(config: Config) -> nn.Module:
    try:
        return build_model(config.model)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed for each epoch of each process, so that a resumed training draws what an uninterrupted one draws."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _summary(record: dict[str, float], epochs: int) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name.startswith(("train_", "test_")))
    return f"epoch {record['epoch'] + 1}/{epochs}: {figures}"
