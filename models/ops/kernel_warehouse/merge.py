"""Which layers of a trained network become faster by merging attention and cells, and doing it."""

import math
from collections.abc import Mapping, Sequence

import torch

from ..native import can_run
from .cost import FACTORS, folding_saves
from .layer import KWLayer
from .mixed_conv import supports
from .native import mixes_natively


def merge_layers_(
    layers: Mapping[str, KWLayer],
    x_shapes: Mapping[str, Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> list[str]:
    """Merge the layers that gain by it.

    A merged layer holds the product of its attention and its cells, and no longer depends on its warehouse.

    Args:
        layers: Converted layers by name, in evaluation mode at temperature 0.
        x_shapes: By name, the shape (B, Cin, *spatial) of each layer's input as it will be served.
        dtype: Type in which products are kept; the cells' by default.
        max_bytes: Most memory that products may take; the layers that gain most per byte come first.

    Returns:
        The names of the merged layers.
    """
    gains = {}
    for name, layer in layers.items():
        if layer.products is not None or not supports("streamed", layer.partition, layer.geometry):
            continue
        weight = layer.attention.fc1.weight
        computed = weight.dtype
        native = can_run(weight.device.type, computed)
        merged_native = mixes_natively(dtype or computed, computed, weight.device.type)
        hidden = layer.attention.fc1.out_features
        batch, _, *size = x_shapes[name]
        positions = math.prod(layer.geometry.output_size(size, layer.partition.kernel[2:]))
        factors = FACTORS.get(weight.device.type, FACTORS["cuda"])
        sizes = hidden, len(layer.cells), batch, positions, computed.itemsize
        saved = folding_saves(layer.partition, *sizes, factors, native, merged_native)
        size_of_products = (hidden + 1) * math.prod(layer.partition.kernel) * (dtype or computed).itemsize
        gains[name] = saved, size_of_products
    left = math.inf if max_bytes is None else max_bytes
    merged = []
    for name, (saved, size) in sorted(gains.items(), key=lambda item: -item[1][0] / item[1][1]):
        if saved > 0 and size <= left:
            layers[name].merge(dtype)
            merged.append(name)
            left -= size
    return merged
