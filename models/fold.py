"""Folding for deployment: attention and cells of a trained network multiplied where that makes it faster."""

import math

import torch
from torch import Tensor, nn

from .convert import remove_unused_warehouses_
from .ops.kernel_warehouse import KWLayer


@torch.no_grad()
def fold_(model: nn.Module, x: Tensor, *, dtype: torch.dtype | None = None, max_bytes: int | None = None) -> nn.Module:
    """Fold the layers of a trained network that become faster by it, in place.

    A folded layer holds the product of its attention and its cells, and no longer depends on the warehouses: nothing
    can go stale, and the network can be evaluated and exported but not trained. The results are the same up to
    rounding. Warehouses that no layer uses any more are removed.

    Args:
        model: A converted network in evaluation mode at temperature 0.
        x: An input as it will be served; its batch and size decide which layers gain.
        dtype: Type in which products are kept. Half precision halves their memory and rounds each to 3 (bfloat16: 2)
            significant digits; on a CPU it is slower.
        max_bytes: Most memory that products may take; the layers that gain most per byte come first.

    Returns:
        model.

    Raises:
        ValueError: A model in training mode, at a temperature, or without a converted layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, KWLayer) and m.products is None}
    if not layers:
        raise ValueError("the model has no converted layer to fold")
    if model.training:
        raise ValueError("only a trained model can be folded; call model.eval() first")
    if any(layer.temperature for layer in layers.values()):
        raise ValueError("only a trained model can be folded: at temperature 0")
    savings = _savings(model, layers, x)
    width = (dtype or x.dtype).itemsize
    sizes = {name: layers[name].merged_values() * width for name in savings}
    left = math.inf if max_bytes is None else max_bytes
    for name in sorted(savings, key=lambda name: -savings[name] / sizes[name]):
        if savings[name] > 0 and sizes[name] <= left:
            layers[name].merge(dtype)
            left -= sizes[name]
    remove_unused_warehouses_(model)
    return model


def _savings(model: nn.Module, layers: dict[str, KWLayer], x: Tensor) -> dict[str, float]:
    """What merging saves in each layer that x reaches."""
    found: dict[str, float] = {}

    def record(name: str, layer: KWLayer, args: tuple[Tensor, ...]) -> None:
        found[name] = layer.merge_saving(args[0])

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: record(name, layer, args))
        for name, layer in layers.items()
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
