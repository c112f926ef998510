"""The truth: attention and mixing by loops, straight from the equations. Slow; for tests."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import EPSILON, Attention
from .partition import Partition


def naive_attention(attention: Attention, x: Tensor, temperature: float) -> Tensor:
    """α of `Attention.forward`, mixture by mixture; shapes as there."""
    pooled = torch.stack([sample.flatten(1).sum(1) / sample[0].numel() for sample in x])
    hidden = attention.norm(pooled @ attention.fc1.weight.T + (0 if attention.fc1.bias is None else attention.fc1.bias))
    hidden = F.relu(hidden)
    n, own = attention.num_cells, attention.own_cells
    rows = attention.fc2.weight.shape[0] // attention.mixtures
    samples = []
    for h in hidden:
        alphas = []
        for i in range(attention.mixtures):
            z = attention.fc2.weight[i * rows : (i + 1) * rows] @ h
            if attention.num_basis:
                basis = z[len(own) : len(own) + attention.num_basis]
                others = iter(attention.fc3.weight @ basis)
                logits = [z[j - own.start] if j in own else next(others) for j in range(n)]
                z = torch.stack([*logits, z[-1]]) + attention.basis_bias[i * (n + 1) : (i + 1) * (n + 1)]
            else:
                z = z + attention.fc2.bias[i * rows : (i + 1) * rows]
            alpha = z / (sum(abs(value) for value in z) + EPSILON)
            alphas.append((1 - temperature) * alpha[:-1] + temperature * attention.assignment[i])
        samples.append(torch.stack(alphas))
    return torch.stack(samples)


def naive_mix(attention: Tensor, cells: Tensor, partition: Partition) -> Tensor:
    """`mix` by loops over samples, mixtures and cells, writing each mixture into its place; shapes as there."""
    batch, _, num_cells = attention.shape
    cout, cin, *c = partition.cell
    kernels = []
    for b in range(batch):
        kernel = attention.new_zeros(partition.kernel)
        places = itertools.product(*(range(count) for count in partition.grid))
        for i, (*position, block_out, block_in) in enumerate(places):
            mixture = sum(attention[b, i, j] * cells[j] for j in range(num_cells))
            window = tuple(slice(p * size, (p + 1) * size) for p, size in zip(position, c, strict=True))
            channels = (slice(block_out * cout, (block_out + 1) * cout), slice(block_in * cin, (block_in + 1) * cin))
            kernel[(*channels, *window)] = mixture
        kernels.append(kernel)
    return torch.stack(kernels)
