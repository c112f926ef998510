"""Folding for deployment: attention and cells of a trained network multiplied where that makes it faster."""

import math

import torch
from torch import Tensor, nn

from .convert import remove_unused_warehouses_
from .ops.kernel_warehouse import KWLayer, supports
from .ops.kernel_warehouse.cost import FACTORS, folding_saves
from .ops.kernel_warehouse.native import mixes_natively
from .ops.native import can_run


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
            significant digits. On a CPU, float16 is slower; bfloat16 is faster where batches are small, since half as
            much is read.
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
    if any(layer.warehouses.temperature for layer in layers.values()):
        raise ValueError("only a trained model can be folded: at temperature 0")
    width = (dtype or x.dtype).itemsize
    factors = FACTORS.get(x.device.type, FACTORS["cuda"])
    native = can_run(x.device.type, x.dtype)
    folded_native = mixes_natively(dtype or x.dtype, x.dtype, x.device.type)
    gains = {}
    for name, positions in _positions(model, layers, x).items():
        layer = layers[name]
        if supports("streamed", layer.partition, layer.geometry):
            hidden = layer.attention.fc1.out_features
            sizes = hidden, len(layer.cells), len(x), positions, x.element_size()
            saved = folding_saves(layer.partition, *sizes, factors, native, folded_native)
            gains[name] = saved, (hidden + 1) * math.prod(layer.partition.kernel) * width
    left = math.inf if max_bytes is None else max_bytes
    for name, (saved, size) in sorted(gains.items(), key=lambda item: -item[1][0] / item[1][1]):
        if saved > 0 and size <= left:
            layers[name].fold(dtype)
            left -= size
    remove_unused_warehouses_(model)
    return model


def _positions(model: nn.Module, layers: dict[str, KWLayer], x: Tensor) -> dict[str, int]:
    """Output positions of each layer that x reaches."""
    seen: dict[str, int] = {}

    def record(name: str, layer: KWLayer, y: Tensor) -> None:
        seen[name] = y[0].numel() // layer.partition.kernel[0]

    hooks = [
        layer.register_forward_hook(lambda layer, _, y, name=name: record(name, layer, y))
        for name, layer in layers.items()
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
