"""Mixing and convolving in one pass: kernels exist a few output channels at a time, while they are in the cache.

For one tile of output channels and samples, the rows of the kernels are mixed and at once multiplied with the columns
of the input. A row comes out of mixing in the order (tap, input channel) of those columns, so that nothing is put in
order. The backward pass mixes each tile again: nothing that grows with samples × kernel is ever written or kept.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dynamic_conv import Geometry, columns, columns_adjoint
from .mixing import mix_rows
from .partition import Partition

# Bytes of a tile's kernels. On a CPU they should share the last-level cache with the cells' rows and the columns.
_TILE_BYTES = {"cpu": 10 << 20, "cuda": 64 << 20}
_TILE_CHANNELS = 64  # fewer make the product with the columns a thin one


def streamed_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) with W[b] mixed on the way; the gradient is of first order only.

    Args:
        alpha: (B, m, n).
        cells: (n, cout, cin, *ones): cells that span one position of the kernel.
        x: (B, Cin, *spatial), of alpha's type.
        partition: How the kernel is cut; it must be of an ungrouped convolution.
        geometry: The convolution's arguments.

    Returns:
        (B, Cout, *output spatial), channels last in memory if x is.
    """
    x, padding = geometry.split_padding(x)
    geometry = Geometry(geometry.stride, tuple((p, p) for p in padding), geometry.dilation, geometry.groups)
    *taps, blocks_out, blocks_in = partition.grid
    alpha = alpha.unflatten(1, (math.prod(taps), blocks_out, blocks_in)).transpose(1, 2).flatten(2, 3)
    return _StreamedConv.apply(alpha, cells, x, tuple(taps), geometry)


class _StreamedConv(torch.autograd.Function):
    """`streamed_conv` of α (B, blocks of output channels, taps · blocks of input channels, n)."""

    @staticmethod
    def forward(ctx, alpha: Tensor, cells: Tensor, x: Tensor, kernel_size: tuple[int, ...], geometry: Geometry):
        ctx.save_for_backward(alpha, cells, x)
        ctx.arguments = kernel_size, geometry
        blocks = alpha.shape[1]
        y, flat = empty_output(x, blocks * cells.shape[1], geometry.output_size(x.shape[2:], kernel_size))
        for samples, rows in tiles(alpha, cells, flat.shape[2], math.prod(kernel_size) > 1):
            seen = columns(x[samples], kernel_size, geometry)
            for channels in rows:
                kernels = _kernels(alpha[samples], cells[:, channels])
                for block, out in _blocks(channels, cells.shape[1], blocks):
                    multiply(kernels[:, block], seen, flat[samples, out])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, cells, x = ctx.saved_tensors
        kernel_size, geometry = ctx.arguments
        needs_alpha, needs_cells, needs_x = ctx.needs_input_grad[:3]
        grad = grad.flatten(2)
        grad_alpha = torch.zeros_like(alpha, dtype=torch.promote_types(alpha.dtype, torch.float32))
        grad_cells = torch.zeros_like(cells) if needs_cells else None
        grad_x = torch.empty_like(x) if needs_x else None
        for samples, rows in tiles(alpha, cells, grad.shape[2], math.prod(kernel_size) > 1):
            seen = columns(x[samples], kernel_size, geometry)
            grad_seen = torch.zeros_like(seen, memory_format=torch.contiguous_format) if needs_x else None
            coefficients = alpha[samples].flatten(0, 2)
            for channels in rows:
                part = cells[:, channels]
                if needs_x:
                    kernels = _kernels(alpha[samples], part)
                grad_kernels = grad.new_empty(part.shape[1], len(seen), alpha.shape[1], seen.shape[2])
                for block, out in _blocks(channels, cells.shape[1], alpha.shape[1]):
                    received = grad[samples, out]
                    if needs_x:
                        grad_seen.baddbmm_(received.mT, kernels[:, block])
                    if needs_alpha or needs_cells:
                        grad_kernels[:, :, block] = torch.bmm(received, seen).transpose(0, 1)
                grad_rows = grad_kernels.view(part.shape[1], len(coefficients), -1)
                if needs_alpha:
                    products = torch.bmm(grad_rows, part.transpose(0, 1).flatten(2).to(grad.dtype).mT)
                    grad_alpha[samples] += products.sum(0, dtype=grad_alpha.dtype).view_as(alpha[samples])
                if needs_cells:
                    product = torch.bmm(coefficients.mT.expand(part.shape[1], -1, -1), grad_rows)
                    grad_cells[:, channels] += product.transpose(0, 1).view_as(part)
            if needs_x:
                grad_x[samples] = columns_adjoint(grad_seen, x.shape[2:], kernel_size, geometry)
        return grad_alpha.to(alpha.dtype) if needs_alpha else None, grad_cells, grad_x, None, None


def _kernels(alpha: Tensor, cells: Tensor) -> Tensor:
    """(B, blocks, parts, n), (n, rows, cin, *ones) → (B, blocks, rows, parts · cin), a view of the rows as mixed."""
    mixed = mix_rows(alpha.flatten(0, 2), cells)
    return mixed.view(cells.shape[1], *alpha.shape[:2], -1).permute(1, 2, 0, 3)


def multiply(kernels: Tensor, seen: Tensor, out: Tensor) -> None:
    """Write into out (B, rows, P) the products of kernels (B, rows, K) and columns (B, P, K), in out's own layout."""
    if out.stride(1) == 1:
        out.copy_(torch.bmm(seen, kernels.mT).mT)
    else:
        out.copy_(torch.bmm(kernels, seen.mT))


def tiles(alpha: Tensor, cells: Tensor, positions: int, copies: bool) -> Iterator[tuple[slice, list[slice]]]:
    """Cut the work so that the kernels of a tile fit in the cache.

    Args:
        alpha: (B, blocks of output channels, parts, n).
        cells: (n, cout, cin, *ones).
        positions: Output positions of a sample.
        copies: Whether columns are a copy of the input, and not a view.

    Yields:
        A slice of samples, and with it the slices of a cell's output channels.
    """
    batch, channels = len(alpha), cells.shape[1]
    if torch.compiler.is_compiling():  # a graph should not hold the loop; its compiler plans the memory
        yield slice(0, batch), [slice(0, channels)]
        return
    column = alpha.shape[2] * cells[0, 0].numel() * alpha.element_size()
    row = alpha.shape[1] * column
    budget = _TILE_BYTES.get(alpha.device.type, _TILE_BYTES["cuda"])
    samples = budget // (row * min(channels, _TILE_CHANNELS))
    if copies:  # they may take a few times the bytes of the kernels
        samples = min(samples, 4 * budget // (column * positions))
    samples = _even(batch, samples)
    rows = _even(channels, max(budget // (row * samples), _TILE_CHANNELS))
    for first in range(0, batch, samples):
        yield slice(first, first + samples), [slice(c, min(c + rows, channels)) for c in range(0, channels, rows)]


def _even(total: int, most: int) -> int:
    """Size of parts of at most `most`, as equal as can be, that make up `total`."""
    return math.ceil(total / math.ceil(total / max(most, 1)))


def _blocks(channels: slice, cout: int, blocks: int) -> Iterator[tuple[int, slice]]:
    """Each block of output channels, and where in y the given channels of its cells lie."""
    for block in range(blocks):
        yield block, slice(block * cout + channels.start, block * cout + channels.stop)


def empty_output(x: Tensor, channels: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An uninitialised (B, channels, *size) in the memory layout of x, and its view (B, channels, positions)."""
    if x.stride(1) == 1:
        y = x.new_empty(len(x), *size, channels).movedim(-1, 1)
    else:
        y = x.new_empty(len(x), channels, *size)
    return y, y.flatten(2)
