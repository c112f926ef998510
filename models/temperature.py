"""The temperature in a training loop of one's own: `TemperatureSchedule`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .convert import anneals, set_temperature


class TemperatureSchedule:
    """Lowers the temperature of every operator in a network, step by step, as main.py does.

    Like a learning-rate schedule of torch it sets the first value when it is made, and the next with each `step`::

        schedule = TemperatureSchedule(model, epochs=100, steps_per_epoch=len(loader))
        for images, targets in loader:
            …
            optimizer.step()
            schedule.step()

    A static network has no temperature, and is left alone.

    Args:
        model: The network, or a module that contains it (DDP, a compiled one).
        *averages: Moving averages of its weights, which are given the same temperature.
        epochs: Epochs of the run.
        steps_per_epoch: Calls of `step` in an epoch: updates of the weights, or batches.
        anneal_epochs: Epochs until the temperature is at its end; None for those of the operator's paper, or a third of
            the run where that is shorter.

    Raises:
        ValueError: A number that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        *averages: nn.Module,
        epochs: float,
        steps_per_epoch: int,
        anneal_epochs: float | None = None,
    ):
        if epochs <= 0 or steps_per_epoch < 1:
            raise ValueError(f"epochs and steps_per_epoch must be positive, found {epochs} and {steps_per_epoch}")
        if anneal_epochs is not None and not 0 <= anneal_epochs <= epochs:
            raise ValueError(f"anneal_epochs must be between 0 and epochs, {epochs:g}; found {anneal_epochs:g}")
        self._networks = (model, *averages)
        self._anneals = {
            name: anneal.within(epochs) if anneal_epochs is None else replace(anneal, epochs=anneal_epochs)
            for name, anneal in anneals(model).items()
        }
        self.steps_per_epoch, self.steps = steps_per_epoch, 0
        self._set()

    @property
    def temperatures(self) -> dict[str, float]:
        """The temperature of each operator, after the steps that were done."""
        return {name: anneal.after(self.steps / self.steps_per_epoch) for name, anneal in self._anneals.items()}

    def step(self) -> None:
        """Count a step, and set the temperature of the next."""
        self.steps += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule is, in plain numbers."""
        return {"steps": self.steps, "steps_per_epoch": self.steps_per_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another schedule was, at the same epoch if it had another number of steps in each.

        Raises:
            ValueError: This is not what `state_dict` gives.
        """
        if not {"steps", "steps_per_epoch"} <= state.keys():
            raise ValueError(
                f"not the state of a TemperatureSchedule: it has {', '.join(map(str, state)) or 'nothing'}"
            )
        self.steps = round(state["steps"] * self.steps_per_epoch / state["steps_per_epoch"])
        self._set()

    def _set(self) -> None:
        for name, value in self.temperatures.items():
            for network in self._networks:
                set_temperature(network, value, name)
