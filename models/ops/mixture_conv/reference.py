"""The definition: mixing by loops, straight from the equation."""

import itertools

from torch import Tensor

from .partition import Partition


def reference_mix(alpha: Tensor, bank: Tensor, partition: Partition) -> Tensor:
    """`mix` by loops over samples, parts and terms, writing each mixture into its place; shapes as there."""
    batch, _, terms = alpha.shape
    cout, cin, *c = partition.cell
    kernels = alpha.new_zeros(batch, *partition.kernel)
    places = itertools.product(*(range(count) for count in partition.grid))
    for i, (*position, block_out, block_in) in enumerate(places):
        window = [slice(p * size, (p + 1) * size) for p, size in zip(position, c, strict=True)]
        channels = slice(block_out * cout, (block_out + 1) * cout), slice(block_in * cin, (block_in + 1) * cin)
        part = bank if tuple(bank.shape[1:]) == partition.cell else bank[(slice(None), *channels, *window)]
        for b in range(batch):
            mixture = sum(alpha[b, i, r] * part[r].to(alpha.dtype) for r in range(terms))
            kernels[(b, *channels, *window)] = mixture
    return kernels
