"""A warning for who trains a network and forgets its temperature."""

import warnings
from typing import Any

import torch

from .ops.api import DynamicLayer


def remind(layer: DynamicLayer, _args: Any = None) -> None:
    """Warn once if a network is being trained whose temperature nobody has set; a forward pre-hook of one layer."""
    if not layer.training or not torch.is_grad_enabled():
        return
    temperature = layer.temperature
    if temperature is None or temperature.driven:
        return
    operator = layer.plan.operator if layer.plan else type(layer).__name__
    if not torch.compiler.is_compiling():  # what is compiled warns when it is
        temperature.driven = True
    _warn(operator, temperature.end)


@torch.compiler.assume_constant_result
def _warn(operator: str, value: float) -> None:
    """Warn, also from the midst of a network while it is compiled."""
    warnings.warn(
        f"the temperature of {operator} stays at {value:g} in this training, since nobody moves it. Add "
        "`schedule = kernelwarehouse.TemperatureSchedule(model, epochs=…, steps_per_epoch=…)` before the loop and "
        f"`schedule.step()` after each step of the optimizer, or `set_temperature(model, {value:g})` to keep it there",
        stacklevel=2,
    )
