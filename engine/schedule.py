"""Learning rate, weight decay and temperature as pure functions of how far the training is."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.optim import Optimizer

from ..configs.schema import ConfigError, RunConfig
from ..models import Anneal


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
        anneals: How the temperature of each operator changes, by its name.
    """

    iterations_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    weight_decay: tuple[float, float]
    anneals: Mapping[str, Anneal]

    @classmethod
    def build(cls, run: RunConfig, iterations_per_epoch: int, anneals: Mapping[str, Anneal]) -> "Schedule":
        """Return the schedule of `run` for epochs of that many micro-batches, for operators with such temperatures.

        Raises:
            ConfigError: A warm-up or a change of the temperature that is longer than the run, or a temperature that an
                operator cannot have.
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
            anneals={name: _fitted(anneal, run, name) for name, anneal in anneals.items()},
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

    def temperatures(self, iteration: int) -> dict[str, float]:
        """Return each operator's temperature at micro-batch number `iteration`, counted from 1 over all epochs."""
        epochs = iteration / self.iterations_per_epoch
        return {name: anneal.after(epochs) for name, anneal in self.anneals.items()}

    def anneals_at(self, iteration: int) -> bool:
        """Whether a temperature is not yet at its end there."""
        return any(value != self.anneals[name].end for name, value in self.temperatures(iteration).items())


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, scaled by the group's own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: Optimizer, decay: float) -> None:
    """Set the weight decay of the parameter groups that decay."""
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = decay


def _fitted(anneal: Anneal, run: RunConfig, operator: str) -> Anneal:
    """The change of a temperature as a run wants it: unset, it takes the paper's length or a third of the run."""
    if run.temp_epoch is not None and run.temp_epoch > run.epochs:
        raise ConfigError(
            f"field 'temp_epoch': the temperature of {operator} would not reach its end, {anneal.end:g}, within "
            f"'epochs', {run.epochs}; found {run.temp_epoch:g}: pass a smaller --temp_epoch, or leave it unset"
        )
    epochs = anneal.within(run.epochs).epochs if run.temp_epoch is None else run.temp_epoch
    if epochs > 0.9 * run.epochs:
        warnings.warn(
            f"field 'temp_epoch': the temperature of {operator} reaches its end after {epochs:g} of {run.epochs} "
            "'epochs', when the learning rate is nearly gone: the network will hardly learn to do without it",
            stacklevel=2,
        )
    low, high = anneal.limits
    if run.temp_init_value is not None and not low <= run.temp_init_value <= high:
        raise ConfigError(
            f"field 'temp_init_value': the temperature of {operator} must be between {low:g} and {high:g}, found "
            f"{run.temp_init_value:g}"
        )
    start = anneal.start if run.temp_init_value is None else run.temp_init_value
    return replace(anneal, start=start, epochs=epochs)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
