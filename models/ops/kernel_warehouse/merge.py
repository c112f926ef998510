"""Which layers of a trained network become faster by merging attention and cells, and doing it."""

import math
from collections.abc import Mapping, Sequence

import torch

from .layer import KWLayer


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
    savings = {name: layer.merge_saving(x_shapes[name]) for name, layer in layers.items() if layer.products is None}
    sizes = {name: layers[name].merged_values() * (dtype or layers[name].cells.dtype).itemsize for name in savings}
    left = math.inf if max_bytes is None else max_bytes
    merged = []
    for name in sorted(savings, key=lambda name: -savings[name] / sizes[name]):
        if savings[name] > 0 and sizes[name] <= left:
            layers[name].merge(dtype)
            merged.append(name)
            left -= sizes[name]
    return merged
