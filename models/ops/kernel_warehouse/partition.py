"""How cells are shared and assigned: arithmetic without tensors (paper, sections 3.1 and 3.3)."""

import math
from collections.abc import Sequence

from ..mixture_conv import Partition

__all__ = ["Partition", "assign", "count_cells", "share_cells"]


def share_cells(mixtures: Sequence[int], num_cells: int) -> list[int]:
    """Divide a warehouse's cells among its layers, in proportion to their mixtures.

    Every layer receives at least one cell: without one, its kernel would be zero at temperature 1 and no signal
    would pass. Beyond that, shares are rounded so that they differ least from m_i · n / Σ m.

    Args:
        mixtures: m of each layer, in the order of the network.
        num_cells: n, the cells of the warehouse.

    Returns:
        Number of cells of each layer; they add up to n.

    Raises:
        ValueError: Fewer cells than layers.
    """
    if num_cells < len(mixtures):
        raise ValueError(f"{num_cells} cells cannot be shared by {len(mixtures)} layers")
    total = sum(mixtures)
    shares = [max(1, m * num_cells // total) for m in mixtures]
    # Integers instead of quotas, so that no rounding decides: surplus_i = (share_i − m_i · n / Σ m) · Σ m.
    while (missing := num_cells - sum(shares)) != 0:
        step = 1 if missing > 0 else -1
        open_layers = [i for i, s in enumerate(shares) if step > 0 or s > 1]
        chosen = min(open_layers, key=lambda i: (step * (shares[i] * total - mixtures[i] * num_cells), i))
        shares[chosen] += step
    return shares


def assign(mixtures: int, num_cells: int, start: int) -> list[int | None]:
    """The assignment β of one layer: the cell that each mixture holds at temperature 1, None for the zero cell.

    With at least as many cells as mixtures, mixture i holds cell start + ⌊i · cells / m⌋. With fewer, the mixtures are
    cut into as many blocks of nearly equal length as there are cells, and cell j goes to place j mod length of
    block j: a diagonal, so that cells spread over the blocks of channels instead of falling on the same one.

    Args:
        mixtures: m of the layer.
        num_cells: Cells that belong to the layer.
        start: The warehouse's index of the first of them.
    """
    if num_cells >= mixtures:
        return [start + i * num_cells // mixtures for i in range(mixtures)]
    holders: list[int | None] = [None] * mixtures
    bounds = [-(-j * mixtures // num_cells) for j in range(num_cells + 1)]
    for j in range(num_cells):
        holders[bounds[j] + j % (bounds[j + 1] - bounds[j])] = start + j
    return holders


def count_cells(total_mixtures: int, ratio: float) -> int:
    """n = max(⌊Σ m · b⌋, 1), where a product that misses a whole number by rounding alone counts as that number."""
    return max(math.floor(total_mixtures * ratio + 1e-9), 1)
