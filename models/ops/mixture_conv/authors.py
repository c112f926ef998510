"""Mixing as the authors of the operators write it, to compare with: all kernels at once, and all of them are kept."""

import itertools

from torch import Tensor

from .mixing import is_shared
from .partition import Partition


def authors_mix(alpha: Tensor, bank: Tensor, partition: Partition) -> Tensor:
    """`mix` by the authors' formulas; arguments and result as there, the result contiguous.

    KernelWarehouse's parts, and the kernels of DY-Conv and CondConv, are one product of all coefficients and all terms.
    ODConv's is the sum over n of the product of coefficients (B, n, 1, 1, *k) and kernels (n, Cout, Cin/groups, *k).
    """
    batch, parts, terms = alpha.shape
    bank = bank.to(alpha.dtype)
    if parts > 1 and not is_shared(bank, partition):
        *spatial, blocks_out, blocks_in = partition.grid
        at_blocks = alpha.transpose(1, 2).reshape(batch, terms, *spatial, blocks_out, blocks_in)
        at_blocks = at_blocks.movedim((-2, -1), (2, 3))
        for dim, size in enumerate(partition.cell, 2):  # a part spans several entries, or one factor is for all
            at_blocks = at_blocks if at_blocks.shape[dim] == 1 else at_blocks.repeat_interleave(size, dim)
        return (at_blocks * bank).sum(dim=1)
    mixed = alpha.reshape(-1, terms) @ bank.reshape(terms, -1)
    dims = len(partition.cell) - 2
    blocks = itertools.chain((1 + dims, 2 + dims), range(1, 1 + dims))  # of channels, then of positions
    order = itertools.chain.from_iterable((block, 3 + dims + i) for i, block in enumerate(blocks))
    return mixed.reshape(batch, *partition.grid, *partition.cell).permute(0, *order).reshape(batch, *partition.kernel)
