"""One epoch of training."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..datasets import FinishingLoader, TrainSampler, begin_epoch
from ..models import set_temperature
from .amp import autocast
from .distributed import World
from .freeze import train_mode
from .keeper import Keeper
from .log import Progress
from .schedule import set_lr, set_weight_decay
from .signals import Interrupted
from .state import NonFiniteLossError, Training

# The mean loss is read back, which waits for the GPU, only every so many steps.
READ_EVERY = 20


class Votes(NamedTuple):
    """What at least one of the processes has found in a step: two faults, and two wishes.

    Attributes:
        loss: A loss is not finite.
        gradient: The gradient is not finite, or so large that its squares are not.
        stop: A process has been told to end.
        save: A process finds that a checkpoint is due.
    """

    loss: bool
    gradient: bool
    stop: bool
    save: bool

    @property
    def fault(self) -> str | None:
        """What makes the step one to skip, in a word."""
        return "loss" if self.loss else "gradient" if self.gradient else None


def vote(world: World, losses_finite: Tensor, norm: Tensor, stop: bool, save: bool) -> Votes:
    """Hear what any process finds, so that all decide alike; a GPU has then done the backward pass.

    Args:
        world: This process's place.
        losses_finite: Whether its losses are, a scalar on its device.
        norm: That of the gradient, a scalar there.
        stop: Whether it has been told to end.
        save: Whether it finds that a checkpoint is due.
    """
    wishes = torch.tensor([stop, save], dtype=torch.float32).to(world.device, non_blocking=True)
    ballot = torch.cat([torch.stack([~losses_finite, ~norm.isfinite()]).float(), wishes])
    return Votes(*(count > 0 for count in world.reduce(ballot).tolist()))


class BufferCopy:
    """A second copy of a model's buffers, from which to undo what a bad step has done to running statistics."""

    def __init__(self, model: nn.Module):
        self.buffers = list(model.buffers())
        self.copies = [buffer.clone() for buffer in self.buffers]

    def take(self) -> None:
        """Copy the buffers as they are now."""
        _copy(self.copies, self.buffers)

    def restore(self) -> None:
        """Make the buffers what they were when they were copied."""
        _copy(self.buffers, self.copies)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def train_epoch(
    training: Training, loader: FinishingLoader[TrainSampler], progress: Progress, keeper: Keeper
) -> dict[str, float]:
    """Train what is left of an epoch, `training.epoch`.

    A step whose loss or gradient is not finite changes nothing but the position, and is counted.

    Args:
        training: What is trained and how; it changes in place.
        loader: This process's micro-batches, all of one size. Every `run.update_freq` of them make a step; the last
            step of the epoch takes those that are left.
        progress: Told of each step and each micro-batch.
        keeper: Writes checkpoints between steps, and hears of signals.

    Returns:
        The mean loss over all processes, the last learning rate, the last temperature if there is one, and the number
        of skipped steps if there were any.

    Raises:
        NonFiniteLossError: More than `run.max_bad_steps` steps in a row had a loss or gradient that is not finite.
        Interrupted: A signal told a process to end; the state is saved.
    """
    run, schedule, batches = training.run, training.schedule, len(loader)
    train_mode(training.model)
    buffers = BufferCopy(training.model)
    shown = training.losses.tolist()
    begin_epoch(loader, training.epoch, training.iteration)
    remaining = iter(loader)
    while training.iteration < batches:
        window = range(training.iteration, min(training.iteration + run.update_freq, batches))
        set_lr(training.optimizer, schedule.lr(training.step))
        set_weight_decay(training.optimizer, schedule.decay(training.step))
        buffers.take()
        finite = accumulate_gradients(training, islice(remaining, len(window)), window, progress)
        norm = gradient_norm(training)
        votes = vote(training.world, finite, norm, keeper.told_to_end, keeper.save_is_due(training.step + 1))
        if votes.fault:
            buffers.restore()
            skip_step(training, window, votes.fault)
        else:
            training.bad_steps = 0
            update_weights(training, norm)
        training.iteration = window.stop
        if training.ema is not None:
            training.set_temperature()  # which the average has averaged, as it does with statistics
        progress.advance(len(window))
        if training.step % READ_EVERY == 0 or window.stop == batches:
            total, count = training.losses.tolist()
            mean = (total - shown[0]) / max(count - shown[1], 1)
            progress.show(loss=mean, **_rates(training))
            shown = [total, count]
        keeper.step_done(votes.save or votes.stop)
        if votes.stop:
            raise Interrupted("told to end by a signal")
    total, count = training.world.reduce(training.losses).tolist()
    skipped = {"skipped_steps": training.skipped} if training.skipped else {}
    return {"loss": total / max(count, 1), **_rates(training), **skipped}


def accumulate_gradients(
    training: Training, batches: Iterator[tuple[Tensor, Tensor]], window: range, progress: Progress
) -> Tensor:
    """Add up the gradients of the micro-batches of a step, whose numbers in the epoch are `window`.

    Returns:
        Whether all losses of this process were finite, a scalar on its device.
    """
    run, world, schedule = training.run, training.world, training.schedule
    # With mixup or cutmix the targets are probabilities, already smoothed.
    criterion = partial(F.cross_entropy, label_smoothing=0.0 if training.mixup else run.smoothing)
    before = training.epoch * schedule.iterations_per_epoch
    finite = torch.ones((), dtype=torch.bool, device=world.device)
    for index, (images, targets) in zip(window, batches, strict=True):
        for operator, value in schedule.temperatures(before + index + 1).items():
            set_temperature(training.model, value, operator)
        images, targets = (t.to(world.device, non_blocking=True) for t in (images, targets))
        if training.mixup:
            images, targets = training.mixup(images, targets)
        if run.channels_last:
            images = images.to(memory_format=torch.channels_last)
        progress.inputs(images)
        # Gradients travel between processes once a step, with the last micro-batch.
        ends_step = index + 1 == window.stop
        with nullcontext() if ends_step else training.no_sync():
            with autocast(run, world.device):
                loss = criterion(training.parallel(images), targets)
            finite &= loss.detach().isfinite()
            training.scaler.scale(loss / len(window)).backward()
        counted = torch.stack([loss.detach(), torch.ones_like(loss)])
        training.losses += torch.where(counted[0].isfinite(), counted, 0)
    return finite


def gradient_norm(training: Training) -> Tensor:
    """Unscale the gradients that have been accumulated, and return the norm of all, a scalar on their device."""
    training.scaler.unscale_(training.optimizer)
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    return get_total_norm(gradients).to(training.world.device)


def update_weights(training: Training, norm: Tensor) -> None:
    """Take one step with the unscaled gradients, whose norm is given, and clear them."""
    optimizer, scaler = training.optimizer, training.scaler
    if training.run.clip_grad is not None:
        clip_grads_with_norm_(training.model.parameters(), training.run.clip_grad, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if training.ema is not None:
        # timm's warm-up counts updates; without it the decay is the same from the first one on.
        training.ema.update(training.model, training.step + 1 if training.run.model_ema_warmup else None)


def skip_step(training: Training, window: range, fault: str) -> None:
    """Clear the gradients of a step whose loss or gradient (`fault` says which) is not finite, and count it.

    Raises:
        NonFiniteLossError: It is one too many in a row.
    """
    training.optimizer.zero_grad()
    if training.scaler.is_enabled():
        training.scaler.update(training.scaler.get_scale() * training.scaler.get_backoff_factor())
    training.skipped += 1
    training.bad_steps += 1
    if training.bad_steps > training.run.max_bad_steps:
        raise NonFiniteLossError(
            f"loss or gradient was not finite in {training.bad_steps} step(s) in a row, the last time the {fault}, in "
            f"epoch {training.epoch}, micro-batches {window.start} to {window.stop - 1}; a lower --lr, --clip_grad or "
            "--amp_dtype bfloat16 may help"
        )


def _rates(training: Training) -> dict[str, float]:
    """The learning rate and the temperature of the step just done."""
    rates = {"lr": training.schedule.lr(training.step - 1)}
    temperatures = training.temperatures
    if len(temperatures) == 1:
        return rates | {"temperature": next(iter(temperatures.values()))}
    return rates | {f"temperature_{operator}": value for operator, value in temperatures.items()}
