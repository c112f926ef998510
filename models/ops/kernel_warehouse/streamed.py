"""Mixing and convolving in one pass: kernels exist a few at a time, while they are in the cache.

For one tile of output channels and samples, the rows of the kernels are mixed and at once applied (`applied.py`). A row
comes out of mixing in the order (tap, input channel), as a matrix product or a channels-last convolution reads it, so
that nothing is put in order. The backward pass mixes each tile again: nothing that grows with samples × kernel is ever
written or kept.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dynamic_conv import even_part
from ..geometry import Geometry
from ..images import empty_images
from .applied import Columns, Workspace
from .mixing import by_output_blocks, mix_rows
from .partition import Partition

# Bytes of a tile's kernels. On a CPU they should share the last-level cache with the cells' rows and the columns.
_TILE_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
_TILE_CHANNELS = 32  # fewer make the product with the columns a thin one


def streamed_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) with W[b] mixed on the way, by products; the gradient is of first order only.

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
    alpha = by_output_blocks(alpha, partition)
    return _StreamedConv.apply(alpha, cells, x, partition.kernel[2:], geometry)


class _StreamedConv(torch.autograd.Function):
    """`streamed_conv` of α (B, blocks of output channels, taps · blocks of input channels, n)."""

    @staticmethod
    def forward(ctx, alpha: Tensor, cells: Tensor, x: Tensor, kernel_size: tuple[int, ...], geometry: Geometry):
        ctx.save_for_backward(alpha, cells, x)
        ctx.arguments = kernel_size, geometry
        y = empty_images(x, alpha.shape[1] * cells.shape[1], geometry.output_size(x.shape[2:], kernel_size))
        flat = y.flatten(2).unflatten(1, (alpha.shape[1], -1))
        space = Workspace(x)
        for samples, rows in _tiles(alpha, cells, flat.shape[3], kernel_size):
            applied = Columns(x[samples], kernel_size, geometry, space)
            for channels in rows:
                applied.apply(_kernels(alpha[samples], cells[:, channels], space), flat[samples, :, channels])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, cells, x = ctx.saved_tensors
        kernel_size, geometry = ctx.arguments
        needs_alpha, needs_cells, needs_x = ctx.needs_input_grad[:3]
        grad = grad.flatten(2).unflatten(1, (alpha.shape[1], -1))
        grad_alpha = torch.zeros_like(alpha, dtype=torch.promote_types(alpha.dtype, torch.float32))
        grad_store = cells.new_empty(cells.shape[1], len(cells), cells[0, 0].numel()) if needs_cells else None
        grad_x = []
        space = Workspace(x)
        for samples, rows in _tiles(alpha, cells, grad.shape[3], kernel_size):
            applied = Columns(x[samples], kernel_size, geometry, space)
            coefficients = alpha[samples].flatten(0, 2)
            for channels in rows:
                part = cells[:, channels]
                kernels = grad_kernels = None
                if needs_x:
                    kernels = _kernels(alpha[samples], part, space)
                if needs_alpha or needs_cells:
                    width = alpha.shape[2] * part[0, 0].numel()
                    grad_kernels = space.take("gradients", part.shape[1], *alpha[samples].shape[:2], width)
                    grad_rows = grad_kernels.view(part.shape[1], len(coefficients), -1)
                    grad_kernels = grad_kernels.permute(1, 2, 0, 3)
                applied.backward(grad[samples, :, channels], kernels, grad_kernels)
                if needs_alpha:
                    products = torch.bmm(grad_rows, part.transpose(0, 1).flatten(2).to(grad.dtype).mT)
                    grad_alpha[samples] += products.sum(0, dtype=grad_alpha.dtype).view_as(alpha[samples])
                if needs_cells:
                    mixed_back = coefficients.mT.expand(part.shape[1], -1, -1)
                    _add_product(grad_store[channels], mixed_back, grad_rows, first=samples.start == 0)
            if needs_x:
                grad_x.append(applied.grad_x())
        grad_cells = grad_store.transpose(0, 1).unflatten(2, cells.shape[2:]) if needs_cells else None
        grad_x = None if not grad_x else grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x)
        return grad_alpha.to(alpha.dtype) if needs_alpha else None, grad_cells, grad_x, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total ← left @ right the first time, total += left @ right after it, in the type of total."""
    if total.dtype != left.dtype:
        product = torch.bmm(left, right)
        total.copy_(product) if first else total.add_(product)
    else:
        total.baddbmm_(left, right, beta=0 if first else 1)


def _kernels(alpha: Tensor, cells: Tensor, space: Workspace) -> Tensor:
    """(B, blocks, parts, n), (n, rows, cin, *ones) → (B, blocks, rows, parts · cin), a view of the rows as mixed."""
    coefficients = alpha.flatten(0, 2)
    out = space.take("kernels", cells.shape[1], len(coefficients), cells[0, 0].numel())
    return mix_rows(coefficients, cells, out).view(cells.shape[1], *alpha.shape[:2], -1).permute(1, 2, 0, 3)


def _tiles(alpha: Tensor, cells: Tensor, positions: int, kernel_size: tuple[int, ...]):
    return tiles(alpha, cells, positions if math.prod(kernel_size) > 1 else 0)


def tiles(alpha: Tensor, cells: Tensor, copied: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut the work so that the kernels of a tile fit in the cache.

    Args:
        alpha: (B, blocks of output channels, parts, n).
        cells: (n, cout, cin, *ones).
        copied: Output positions of a sample for which what they read is copied.

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
    least = min(channels, _TILE_CHANNELS)
    samples = even_part(batch, min(budget // (row * least), 2 * budget // max(column * copied, 1)))
    rows = even_part(channels, max(budget // (row * samples), least), _TILE_CHANNELS)
    for first in range(0, batch, samples):
        yield slice(first, first + samples), [slice(c, min(c + rows, channels)) for c in range(0, channels, rows)]
