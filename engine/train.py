"""One epoch of training."""

import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from kernelwarehouse.models import set_temperature

from .amp import autocast
from .log import Progress
from .schedule import set_lr
from .state import Training

# The loss is read back, which waits for the GPU, only every so many steps.
READ_EVERY = 20


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


class LossMeter:
    """The mean of losses that stay on the device until they are read."""

    def __init__(self, device: torch.device):
        self.unread = torch.zeros((), dtype=torch.float64, device=device)
        self.total, self.seen, self.read_up_to = 0.0, 0, 0

    def add(self, loss: Tensor) -> None:
        """Count the loss of a micro-batch, without waiting for it."""
        self.unread += loss.detach()
        self.seen += 1

    def read(self) -> float:
        """Wait for the device and return the mean of the losses since the last reading.

        Raises:
            NonFiniteLossError: It is not finite.
        """
        start, self.read_up_to, value = self.read_up_to, self.seen, self.unread.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value} within iterations {start} to {self.seen - 1}; a lower --lr, --clip_grad or "
                "--amp_dtype bfloat16 may help"
            )
        self.total += value
        self.unread.zero_()
        return value / (self.seen - start)


def train_epoch(training: Training, loader: DataLoader, progress: Progress) -> dict[str, float]:
    """Train for one epoch, `training.epoch`, and count it.

    Args:
        training: What is trained and how; it changes in place.
        loader: This process's micro-batches, all of one size. Every `run.update_freq` of them make a step; the last
            step of the epoch takes those that are left.
        progress: Told of each step.

    Returns:
        The mean loss over all processes, the last learning rate, and the last temperature if there is one.

    Raises:
        NonFiniteLossError: At the latest `READ_EVERY` steps after the loss was not finite, and before the epoch ends.
    """
    run, world = training.run, training.world
    # With mixup or cutmix the targets are probabilities, already smoothed.
    criterion = partial(F.cross_entropy, label_smoothing=0.0 if training.mixup else run.smoothing)
    training.model.train()
    loader.sampler.set_epoch(training.epoch)
    batches, before = len(loader), training.epoch * len(loader)
    meter = LossMeter(world.device)
    annealed: dict[str, float] = {}
    for index, (images, targets) in enumerate(loader):
        window_start = index - index % run.update_freq
        window_end = min(window_start + run.update_freq, batches)
        ends_window = index + 1 == window_end
        if index == window_start:
            set_lr(training.optimizer, lr := training.schedule.lr(training.step))
        if training.schedule.anneal_iterations:
            annealed["temperature"] = training.schedule.temperature(before + index + 1)
            set_temperature(training.model, annealed["temperature"])

        images, targets = (t.to(world.device, non_blocking=True) for t in (images, targets))
        if training.mixup:
            images, targets = training.mixup(images, targets)
        # Gradients travel between processes once a step, with the last micro-batch.
        with nullcontext() if ends_window else training.no_sync():
            with autocast(run, world.device):
                loss = criterion(training.parallel(images), targets)
            training.scaler.scale(loss / (window_end - window_start)).backward()
        meter.add(loss)

        if ends_window:
            update_weights(training)
            progress.advance(window_end - window_start)
            if training.step % READ_EVERY == 0 or window_end == batches:
                progress.show(loss=meter.read(), lr=lr, **annealed)
    training.epoch += 1
    loss = (
        world.reduce(torch.tensor(meter.total / batches, dtype=torch.float64, device=world.device)).item() / world.size
    )
    return {"loss": loss, "lr": lr, **annealed}


def update_weights(training: Training) -> None:
    """Take one step with the gradients that have been accumulated, and clear them."""
    optimizer, scaler = training.optimizer, training.scaler
    if training.run.clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.run.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    training.step += 1
    if training.ema is not None:
        training.ema.update(training.model)
