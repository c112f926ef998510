"""A warning for who trains a network and forgets its temperature."""

import warnings
from typing import Any

import torch

from .ops.api import DynamicLayer


def remind(layer: DynamicLayer, _args: Any = None) -> None:
    """Warn once if a network is being trained whose temperature nobody has set; a forward pre-hook of one layer.

    A compiled network is not looked at: a warning in its midst would break its graph.
    """
    if torch.compiler.is_compiling() or not layer.training or not torch.is_grad_enabled():
        return
    temperature = layer.temperature
    if temperature is None or temperature.driven:
        return
    temperature.driven = True
    value, operator = temperature.value.item(), layer.plan.operator if layer.plan else type(layer).__name__
    warnings.warn(
        f"the temperature of {operator} stays at {value:g} in this training, since nobody moves it. Add "
        "`schedule = kernelwarehouse.TemperatureSchedule(model, epochs=…, steps_per_epoch=…)` before the loop and "
        f"`schedule.step()` after each step of the optimizer, or `set_temperature(model, {value:g})` to keep it there",
        stacklevel=2,
    )
