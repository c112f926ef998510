"""Kernels from coefficients and cells, w_i = Σ_j α_ij e_j (paper, equation 3), and the inverse of assembling them."""

import itertools
import math

import torch
from torch import Tensor

from .partition import Partition


def mix(attention: Tensor, cells: Tensor, partition: Partition) -> Tensor:
    """Assemble one kernel for each sample.

    Args:
        attention: α, (B, m, n).
        cells: The warehouse, (n, cout, cin, *c).
        partition: How the kernel is cut.

    Returns:
        (B, Cout, Cin/groups, *k).
    """
    batch, num_cells = attention.shape[0], attention.shape[2]
    if cells[0, 0].numel() == 1:  # of a depthwise convolution, whose output channels come to lie together
        mixtures = attention.reshape(-1, num_cells) @ cells.flatten(1).to(attention.dtype)
        return _assemble(mixtures.view(batch, *partition.grid, *partition.cell), partition)
    rows = mix_rows(attention.reshape(-1, num_cells), cells)
    mixtures = rows.reshape(partition.cell[0], batch, *partition.grid, *partition.cell[1:])
    return _assemble(mixtures.movedim(0, 1 + len(partition.grid)), partition)


def mix_rows(attention: Tensor, cells: Tensor, out: Tensor | None = None) -> Tensor:
    """Mix each output channel's row of the cells by itself: small products whose operands stay in the cache.

    Args:
        attention: α, (M, n).
        cells: (n, cout, cin, *c), best with the layout of `Warehouses`.
        out: Where to write the result, if given.

    Returns:
        (cout, M, cin · *c).
    """
    rows = cells.transpose(0, 1).flatten(2).to(attention.dtype)
    return torch.bmm(attention.expand(len(rows), -1, -1), rows, out=out)


def by_output_blocks(attention: Tensor, partition: Partition) -> Tensor:
    """α (B, m, n) as (B, blocks of output channels, positions of the kernel · blocks of input channels, n)."""
    *spatial, blocks_out, blocks_in = partition.grid
    batch, _, num_cells = attention.shape
    positions = math.prod(spatial)
    if positions == 1 or blocks_out == 1:  # they are in that order
        return attention.reshape(batch, blocks_out, positions * blocks_in, num_cells)
    split = attention.reshape(batch, positions, blocks_out, blocks_in, num_cells).transpose(1, 2)
    return split.reshape(batch, blocks_out, positions * blocks_in, num_cells)


def by_positions(gradient: Tensor, partition: Partition) -> Tensor:
    """The inverse of `by_output_blocks`: (B, m, n)."""
    *spatial, blocks_out, blocks_in = partition.grid
    batch, _, _, num_cells = gradient.shape
    split = gradient.reshape(batch, blocks_out, math.prod(spatial), blocks_in, num_cells).transpose(1, 2)
    return split.reshape(batch, partition.mixtures, num_cells)


def cut(kernel: Tensor, partition: Partition) -> Tensor:
    """The inverse of assembling: a kernel (Cout, Cin/groups, *k) as its mixtures (m, *cell)."""
    dims = len(partition.cell) - 2
    *spatial, blocks_out, blocks_in = partition.grid
    cout, cin, *c = partition.cell
    split = kernel.reshape(blocks_out, cout, blocks_in, cin, *itertools.chain(*zip(spatial, c, strict=True)))
    counts = [4 + 2 * d for d in range(dims)] + [0, 2]
    sizes = [1, 3] + [5 + 2 * d for d in range(dims)]
    return split.permute(*counts, *sizes).reshape(partition.mixtures, *partition.cell)


def _assemble(mixtures: Tensor, partition: Partition) -> Tensor:
    """(B, *grid, *cell) → (B, *kernel)."""
    dims = len(partition.cell) - 2
    block_out, block_in, first_size = 1 + dims, 2 + dims, 3 + dims
    order = [0, block_out, first_size, block_in, first_size + 1]
    for d in range(dims):
        order += [1 + d, first_size + 2 + d]
    return mixtures.permute(order).reshape(-1, *partition.kernel)
