"""Merging for deployment: what a trained network's layers can compute once and for all, where that makes it faster."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .convert import dynamic_layers
from .operators import get_operator


@torch.no_grad()
def merge_(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """Merge the layers of a trained network that become faster by it, in place.

    A merged layer no longer depends on what it shared: nothing can go stale, and the network can be evaluated and
    exported but not trained. The results are the same up to rounding. What no layer uses any more is gone.

    Args:
        model: A converted network in evaluation mode at the temperature of a trained one, or a module that holds one.
        x: An input of `model` as it will be served; its batch and size decide which layers gain.
        **options: The operator's: for KernelWarehouse `dtype`, the type in which products are kept (half precision
            halves their memory and rounds each to 3, bfloat16 to 2 significant digits), and `max_bytes`, the most
            memory that they may take (the layers that gain most per byte come first).

    Returns:
        model.

    Raises:
        ValueError: A model in training mode, at another temperature, without a converted layer, or of an operator that
            has nothing to merge; nothing is changed then.
    """
    layers = dynamic_layers(model)
    if not layers:
        raise ValueError("the model has no converted layer to merge")
    for name, layer in layers.items():
        if layer.training:
            raise ValueError(
                f"only a trained model can be merged, and {name} is in training mode: call model.eval() first"
            )
        if layer.temperature is not None and (value := layer.temperature.value.item()) != layer.temperature.end:
            end = layer.temperature.end
            raise ValueError(
                f"only a trained model can be merged: {name} is at temperature {value:g}, a trained one at {end:g}"
            )
    shapes = _input_shapes(model, x)
    by_operator: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        if layer.plan is None:
            raise ValueError(f"{name} was not made by a conversion; merge it by itself")
        if name in shapes:  # what this input does not reach stays as it is
            by_operator.setdefault(layer.plan.operator, {})[name] = layer
    for operator, own in by_operator.items():
        get_operator(operator).check_merge(own, **options)
    for operator, own in by_operator.items():
        get_operator(operator).merge_(own, {name: shapes[name] for name in own}, **options)
    return model


def _input_shapes(model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of the input of each converted layer that x reaches, as the layer's convolution sees it."""
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str, layer: Any, args: tuple[Tensor, ...]) -> None:
        seen[name] = tuple(layer.as_images(args[0]).shape)

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in dynamic_layers(model).items()]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
