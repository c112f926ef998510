"""Learning rate, weight decay and temperature as pure functions of how far the training is."""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from ..configs.schema import ConfigError, RunConfig


@dataclass(frozen=True)
class Schedule:
    """What changes with time. An iteration is one micro-batch, a step is one update of the weights.

    Attributes:
        iterations_per_epoch: Micro-batches of one process in an epoch.
        steps_per_epoch: Updates in an epoch; the last one may have fewer micro-batches.
        total_steps: Updates in the whole run.
        warmup_steps: Updates over which the learning rate rises linearly to its peak.
        peak_lr: Highest learning rate.
        min_lr: Where the cosine ends.
        weight_decay: Weight decay at the start, and its end.
        anneal_iterations: Iterations over which the temperature falls linearly to 0.
        peak_temperature: Where the temperature starts.
    """

    iterations_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    weight_decay: tuple[float, float]
    anneal_iterations: float
    peak_temperature: float

    @classmethod
    def build(cls, run: RunConfig, iterations_per_epoch: int) -> "Schedule":
        """Return the schedule of `run` for epochs of that many micro-batches.

        Raises:
            ConfigError: A warm-up longer than the run.
        """
        steps_per_epoch = math.ceil(iterations_per_epoch / run.update_freq)
        total = run.epochs * steps_per_epoch
        warmup = run.warmup_steps if run.warmup_steps > 0 else round(run.warmup_epochs * steps_per_epoch)
        if warmup > total:
            field = "warmup_steps" if run.warmup_steps > 0 else "warmup_epochs"
            raise ConfigError(
                f"field '{field}': {warmup} steps of warm-up are more than the run's {total} "
                f"({run.epochs} epochs of {steps_per_epoch}); pass a smaller --{field}"
            )
        return cls(
            iterations_per_epoch=iterations_per_epoch,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            warmup_steps=warmup,
            peak_lr=run.lr,
            min_lr=run.min_lr,
            weight_decay=(run.weight_decay, run.weight_decay if (end := run.weight_decay_end) is None else end),
            anneal_iterations=run.temp_epoch * iterations_per_epoch,
            peak_temperature=run.temp_init_value,
        )

    def lr(self, step: int) -> float:
        """Return the learning rate of update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return _cosine(self.peak_lr, self.min_lr, progress)

    def decay(self, step: int) -> float:
        """Return the weight decay of update number `step`, counted from 0."""
        start, end = self.weight_decay
        return _cosine(start, end, step / self.total_steps) if start != end else start

    def temperature(self, iteration: int) -> float:
        """Return the temperature of micro-batch number `iteration`, counted from 1 over all epochs."""
        if iteration >= self.anneal_iterations:
            return 0.0
        return self.peak_temperature * (1 - iteration / self.anneal_iterations)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, scaled by the group's own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: Optimizer, decay: float) -> None:
    """Set the weight decay of the parameter groups that decay."""
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = decay


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
