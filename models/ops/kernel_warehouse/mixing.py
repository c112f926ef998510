"""Kernels from cells: w_i = Σ_j α_ij e_j for every mixture of every sample, put back in order (paper, equation 3)."""

import itertools

import torch
from torch import Tensor

from .partition import Partition


def mix(attention: Tensor, cells: Tensor, partition: Partition) -> Tensor:
    """Assemble one kernel for each sample.

    Args:
        attention: α, (B, m, n).
        cells: The warehouse, (n, *cell).
        partition: How the kernel is cut.

    Returns:
        (B, Cout, Cin/groups, *k).
    """
    batch = attention.shape[0]
    mixtures = torch.matmul(attention, cells.flatten(1).to(attention.dtype))
    return _assemble(mixtures.reshape(batch, *partition.grid, *partition.cell), partition)


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
