"""Kernels from coefficients and a bank, W[b, part] = Σ_r α[b, part, r] · bank[…, r], and the inverse of assembling."""

import itertools
import math

import torch
from torch import Tensor

from ..context import as_type
from .partition import Partition


def is_shared(bank: Tensor, partition: Partition) -> bool:
    """Whether all parts of the kernel share the bank (n, *cell); it is (n, *kernel) where each has its own.

    Of a kernel of one part both are the same; it counts as shared where it has one position.

    Raises:
        ValueError: It is neither.
    """
    shape = tuple(bank.shape[1:])
    if shape == partition.kernel and not (shape == partition.cell and partition.by_positions):
        return False
    if shape == partition.cell:
        return True
    raise ValueError(
        f"a bank must be (n, *cell) with cells {partition.cell}, or (n, *kernel) with kernels {partition.kernel}; "
        f"found {tuple(bank.shape)}"
    )


def mix(alpha: Tensor, bank: Tensor, partition: Partition) -> Tensor:
    """Assemble one kernel for each sample.

    Args:
        alpha: α, (B, m, n).
        bank: (n, *cell), shared by all parts, or (n, *kernel).
        partition: How the kernel is cut.

    Returns:
        (B, Cout, Cin/groups, *k); with input channels last in memory, but for a kernel of one part.
    """
    batch, num_terms = alpha.shape[0], alpha.shape[2]
    shared = is_shared(bank, partition)
    if partition.cell == partition.kernel and bank.is_contiguous():  # one product, whose result is in torch's order
        return (alpha[:, 0] @ bank.flatten(1).to(alpha.dtype)).view(batch, *partition.kernel)
    if not shared:
        parts = cut(bank, partition).transpose(0, 1).flatten(2)  # (m, n, cell)
        mixed = torch.bmm(alpha.transpose(0, 1), parts.to(alpha.dtype)).transpose(0, 1)
        return _assemble(mixed.reshape(batch, *partition.grid, *partition.cell), partition)
    if partition.kernel[1] == 1 and partition.by_positions:  # as in a depthwise convolution
        mixed = alpha.reshape(-1, num_terms) @ as_type(bank.flatten(1), alpha.dtype)
        dims = len(partition.kernel) - 2
        last = mixed.view(batch, *partition.kernel[2:], partition.kernel[0])
        return last.permute(0, 1 + dims, *range(1, 1 + dims)).unsqueeze(2)  # movedim, for TorchScript's exporter
    # Each output channel's row of the cells by itself: small products whose operands stay in the cache.
    rows = bank.transpose(0, 1).flatten(2).to(alpha.dtype)
    mixed = torch.bmm(alpha.reshape(-1, num_terms).expand(len(rows), -1, -1), rows)
    mixed = mixed.reshape(partition.cell[0], batch, *partition.grid, *partition.cell[1:])
    return _assemble(mixed.movedim(0, 1 + len(partition.grid)), partition)


def by_output_blocks(alpha: Tensor, partition: Partition) -> Tensor:
    """α (B, m, n) as (B, blocks of output channels, positions of the kernel · blocks of input channels, n)."""
    *spatial, blocks_out, blocks_in = partition.grid
    batch, _, num_terms = alpha.shape
    positions = math.prod(spatial)
    if positions == 1 or blocks_out == 1:  # they are in that order
        return alpha.reshape(batch, blocks_out, positions * blocks_in, num_terms)
    split = alpha.reshape(batch, positions, blocks_out, blocks_in, num_terms).transpose(1, 2)
    return split.reshape(batch, blocks_out, positions * blocks_in, num_terms)


def by_positions(gradient: Tensor, partition: Partition) -> Tensor:
    """The inverse of `by_output_blocks`: (B, m, n)."""
    *spatial, blocks_out, blocks_in = partition.grid
    batch, _, _, num_terms = gradient.shape
    split = gradient.reshape(batch, blocks_out, math.prod(spatial), blocks_in, num_terms).transpose(1, 2)
    return split.reshape(batch, partition.mixtures, num_terms)


def at_every_position(alpha: Tensor, partition: Partition) -> tuple[Tensor, Partition]:
    """α and the partition for cells of one position of the kernel: α is repeated within those that span more."""
    *counts, blocks_out, blocks_in = partition.grid
    c = partition.cell[2:]
    alpha = alpha.reshape(len(alpha), *counts, blocks_out * blocks_in, -1)
    for dim, size in enumerate(c):
        alpha = alpha.repeat_interleave(size, 1 + dim) if size > 1 else alpha
    fine = Partition(partition.kernel, (*partition.cell[:2], *(1,) * len(c)))
    return alpha.reshape(len(alpha), fine.mixtures, -1), fine


def cut(kernels: Tensor, partition: Partition) -> Tensor:
    """The inverse of assembling: kernels (n, Cout, Cin/groups, *k) as their cells (n, m, *cell)."""
    dims = len(partition.cell) - 2
    *spatial, blocks_out, blocks_in = partition.grid
    cout, cin, *c = partition.cell
    split = kernels.reshape(-1, blocks_out, cout, blocks_in, cin, *itertools.chain(*zip(spatial, c, strict=True)))
    counts = [5 + 2 * d for d in range(dims)] + [1, 3]
    sizes = [2, 4] + [6 + 2 * d for d in range(dims)]
    return split.permute(0, *counts, *sizes).reshape(-1, partition.mixtures, *partition.cell)


def _assemble(mixtures: Tensor, partition: Partition) -> Tensor:
    """(B, *grid, *cell) → (B, *kernel), with input channels last in memory."""
    dims = len(partition.cell) - 2
    block_out, block_in, first_size = 1 + dims, 2 + dims, 3 + dims
    order = [0, block_out, first_size]
    for d in range(dims):
        order += [1 + d, first_size + 2 + d]
    order += [block_in, first_size + 1]
    cout, cin, *k = partition.kernel
    last = mixtures.permute(order).reshape(-1, cout, *k, cin)
    return last.permute(0, 1, 2 + dims, *range(2, 2 + dims))  # movedim(-1, 2), as TorchScript's exporter knows it
