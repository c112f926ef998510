"""The product of coefficients, cells and input, in either of two orders.

A layer computes y = Σ_i Σ_j α_ij (e_j applied to x_i), where x_i is the part of the input that mixture i reads. It may
mix kernels first (w_i = Σ_j α_ij e_j, paper, equation 3), and then convolve each sample with its own; or mix inputs
first (u_j = Σ_i α_ij x_i), and then apply the cells, which are the same for the whole batch: one dense product, and no
kernels to write and read. The results are equal up to rounding.
"""

import itertools
import math

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


def mix_inputs(attention: Tensor, cells: Tensor, inputs: Tensor, partition: Partition) -> Tensor:
    """Apply the kernels that `mix` would assemble, without assembling them.

    Args:
        attention: α, (B, m, n).
        cells: The warehouse, (n, *cell).
        inputs: For each output position, the input that each spatial position and input block of the kernel reads:
            (B, spatial positions × input blocks, P, cin × *c).
        partition: How the kernel is cut; it must be of an ungrouped convolution.

    Returns:
        (B, P, Cout).
    """
    batch, parts, positions, size = inputs.shape
    *_, blocks_out, blocks_in = partition.grid
    num_cells, cout = cells.shape[:2]
    alpha = attention.reshape(batch, -1, blocks_out, blocks_in, num_cells).permute(0, 2, 4, 1, 3)
    mixed = torch.matmul(alpha.reshape(batch, blocks_out * num_cells, parts), inputs.reshape(batch, parts, -1))
    mixed = mixed.reshape(batch, blocks_out, num_cells, positions, size).permute(2, 0, 3, 1, 4)
    rows = mixed.reshape(num_cells, batch * positions * blocks_out, size)
    y = torch.addbmm(rows.new_zeros(()), rows, cells.flatten(2).mT.to(rows.dtype), beta=0)
    return y.reshape(batch, positions, blocks_out * cout)


# Multiply-adds that moving a value through memory costs as much as, as measured on a CPU with batches of 1 to 64: a
# kernel is written, put in order and read, mostly beyond the caches; mixed inputs are fewer and stay nearer.
_KERNEL_TRAFFIC, _INPUT_TRAFFIC = 100, 40


def prefers_inputs(partition: Partition, num_cells: int, positions: int) -> bool:
    """Whether mixing inputs costs less than mixing kernels, for `positions` output positions of a sample."""
    *_, blocks_out, _ = partition.grid
    cout = partition.cell[0]
    kernel = math.prod(partition.kernel)
    mixed = blocks_out * num_cells * (math.prod(partition.cell) // cout) * positions
    kernels_cost = kernel * (num_cells + positions + _KERNEL_TRAFFIC)
    inputs_cost = mixed * (partition.mixtures // blocks_out + cout + _INPUT_TRAFFIC)
    return inputs_cost < kernels_cost


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
