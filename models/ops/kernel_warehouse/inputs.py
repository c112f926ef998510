"""Mixing inputs instead of kernels: u_j = Σ_i α_ij x_i, then y = Σ_j e_j u_j, one dense product for the whole batch."""

import itertools
import math

import torch
from torch import Tensor

from ..dynamic_conv import windows
from ..geometry import Geometry
from .partition import Partition


def inputs_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) without assembling W[b]; arguments and result as `streamed_conv`, cells of any size."""
    size = geometry.output_size(x.shape[2:], partition.kernel[2:])
    y = mix_inputs(alpha, cells, _parts(x, partition, geometry), partition)
    y = y.reshape(len(x), *size, -1).movedim(-1, 1)
    return y if x.stride(1) == 1 else y.contiguous()


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
    rows = mixed.reshape(batch, blocks_out, num_cells, positions, size).permute(0, 3, 1, 2, 4)
    flat = cells.transpose(0, 1).flatten(1)  # (cout, n · size): one sum over cells and inputs, in one product
    y = torch.matmul(rows.reshape(-1, num_cells * size), flat.mT.to(rows.dtype))
    return y.reshape(batch, positions, blocks_out * cout)


def _parts(x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """What each part of the kernel reads of x (B, C, *spatial), as `mix_inputs` takes it."""
    *blocks, _, blocks_in = partition.grid
    _, cin, *c = partition.cell
    dims = len(blocks)
    seen = windows(x, partition.kernel[2:], geometry)
    size = seen.shape[2 : 2 + dims]
    seen = seen.reshape(len(x), blocks_in, cin, *size, *itertools.chain(*zip(blocks, c, strict=True)))
    spatial, inside = range(3 + dims, 3 + 3 * dims, 2), range(4 + dims, 3 + 3 * dims, 2)
    seen = seen.permute(0, *spatial, 1, *range(3, 3 + dims), 2, *inside)
    return seen.reshape(len(x), math.prod(blocks) * blocks_in, math.prod(size), -1)
