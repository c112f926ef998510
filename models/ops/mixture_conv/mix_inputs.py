"""Mixing inputs instead of kernels: u_j = Σ_i α_ij x_i, then y = Σ_j e_j u_j, one dense product for the whole batch."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..derivatives import gradients_by_autograd
from ..geometry import Geometry
from ..per_sample_conv import windows
from .partition import Partition


def mix_inputs(x: Tensor, alpha: Tensor, cells: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) without assembling W[b].

    Args:
        x: (B, Cin, *spatial).
        alpha: α, (B, m, n).
        cells: The bank that all parts share, (n, *cell).
        partition: How the kernel is cut; it must be of an ungrouped convolution.
        geometry: The convolution's arguments.

    Returns:
        (B, Cout, *output spatial), channels last in memory if x is.
    """
    rows, flat = _mixed(x, alpha, partition, geometry), _flat(cells)
    y = torch.matmul(rows, flat.mT.to(rows.dtype))
    output_size = geometry.output_size(x.shape[2:], partition.kernel[2:])
    y = y.reshape(len(x), *output_size, partition.kernel[0]).movedim(-1, 1)
    return y if x.stride(1) == 1 else y.contiguous()


def gradients(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    partition: Partition,
    geometry: Geometry,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, α and the cells, as needed, given that of y: inputs are mixed again, outputs are not computed."""
    n, cout = cells.shape[:2]
    outputs, grad_cells = grad.movedim(1, -1).reshape(-1, cout), None

    def grad_rows(rows: Tensor) -> Tensor:
        nonlocal grad_cells
        if needs[2]:
            grad_cells = torch.matmul(outputs.mT, rows).to(cells.dtype).view(cout, n, *cells.shape[2:]).transpose(0, 1)
        return torch.matmul(outputs, _flat(cells).to(outputs.dtype))

    def mixed(x: Tensor, alpha: Tensor) -> Tensor:
        return _mixed(x, alpha, partition, geometry)

    grad_x, grad_alpha = gradients_by_autograd(mixed, (x, alpha), needs[:2], grad_rows)
    return grad_x, grad_alpha, grad_cells


def _flat(cells: Tensor) -> Tensor:
    """(n, cout, cin, *c) → (cout, n · size): one sum over cells and inputs, in one product."""
    return cells.transpose(0, 1).flatten(1)


def _mixed(x: Tensor, alpha: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """u for each sample, position and block of output channels, as rows (…, n · size)."""
    inputs = _parts(x, partition, geometry)
    batch, parts, positions, size = inputs.shape
    *_, blocks_out, blocks_in = partition.grid
    n = alpha.shape[2]
    coefficients = alpha.reshape(batch, -1, blocks_out, blocks_in, n).permute(0, 2, 4, 1, 3)
    mixed = torch.matmul(coefficients.reshape(batch, blocks_out * n, parts), inputs.reshape(batch, parts, -1))
    return mixed.reshape(batch, blocks_out, n, positions, size).permute(0, 3, 1, 2, 4).reshape(-1, n * size)


def _parts(x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """What each part of the kernel reads: (B, positions of the kernel × input blocks, P, cin × *c)."""
    *blocks, _, blocks_in = partition.grid
    _, cin, *c = partition.cell
    dims = len(blocks)
    seen = windows(x, partition.kernel[2:], geometry)
    size = seen.shape[2 : 2 + dims]
    seen = seen.reshape(len(x), blocks_in, cin, *size, *itertools.chain(*zip(blocks, c, strict=True)))
    spatial, inside = range(3 + dims, 3 + 3 * dims, 2), range(4 + dims, 3 + 3 * dims, 2)
    seen = seen.permute(0, *spatial, 1, *range(3, 3 + dims), 2, *inside)
    return seen.reshape(len(x), math.prod(blocks) * blocks_in, math.prod(size), -1)
