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
from .contraction import CellsFirst, Order
from .mixing import by_output_blocks
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
    return stream(CellsFirst, x, partition, geometry, by_output_blocks(alpha, partition), cells)


def stream(order: Order, x: Tensor, partition: Partition, geometry: Geometry, *factors: Tensor) -> Tensor:
    """`streamed_conv` with kernels made of any factors, in an order of `contraction`."""
    x, padding = geometry.split_padding(x)
    geometry = Geometry(geometry.stride, tuple((p, p) for p in padding), geometry.dilation, geometry.groups)
    return _StreamedConv.apply(order, x, partition.kernel[2:], geometry, *factors)


class _StreamedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, order: Order, x: Tensor, kernel_size: tuple[int, ...], geometry: Geometry, *factors: Tensor):
        ctx.save_for_backward(x, *factors)
        ctx.arguments = order, kernel_size, geometry
        mixed = order(*factors)
        _, blocks, rows, _ = mixed.shape
        y = empty_images(x, blocks * rows, geometry.output_size(x.shape[2:], kernel_size))
        flat = y.flatten(2).unflatten(1, (blocks, -1))
        space = Workspace(x)
        for samples, parts in _tiles(mixed.shape, x, flat.shape[3], kernel_size):
            applied = Columns(x[samples], kernel_size, geometry, space)
            for channels in parts:
                applied.apply(mixed.kernels(samples, channels, space), flat[samples, :, channels])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, *factors = ctx.saved_tensors
        order, kernel_size, geometry = ctx.arguments
        needs_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        mixed = order(*factors, needs=needs)
        grad = grad.flatten(2).unflatten(1, (mixed.shape[1], -1))
        grad_x = []
        space = Workspace(x)
        for samples, parts in _tiles(mixed.shape, x, grad.shape[3], kernel_size):
            applied = Columns(x[samples], kernel_size, geometry, space)
            for channels in parts:
                kernels = mixed.kernels(samples, channels, space) if needs_x else None
                grad_kernels = mixed.room(samples, channels, space) if any(needs) else None
                applied.backward(grad[samples, :, channels], kernels, grad_kernels)
                if any(needs):
                    mixed.receive(samples, channels, grad_kernels)
            if needs_x:
                grad_x.append(applied.grad_x())
        grad_x = None if not grad_x else grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x)
        return None, grad_x, None, None, *mixed.gradients()


def _tiles(shape: tuple[int, ...], x: Tensor, positions: int, kernel_size: tuple[int, ...]):
    return tiles(shape, x, positions if math.prod(kernel_size) > 1 else 0)


def tiles(shape: tuple[int, ...], x: Tensor, copied: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut the work so that the kernels of a tile fit in the cache.

    Args:
        shape: Of all kernels: (B, blocks of output channels, rows of a block, K).
        x: A tensor of the type that is computed in, on the device.
        copied: Output positions of a sample for which what they read is copied.

    Yields:
        A slice of samples, and with it the slices of a block's rows.
    """
    batch, blocks, channels, length = shape
    if torch.compiler.is_compiling():  # a graph should not hold the loop; its compiler plans the memory
        yield slice(0, batch), [slice(0, channels)]
        return
    column = length * x.element_size()
    row = blocks * column
    budget = _TILE_BYTES.get(x.device.type, _TILE_BYTES["cuda"])
    least = min(channels, _TILE_CHANNELS)
    samples = even_part(batch, min(budget // (row * least), 2 * budget // max(column * copied, 1)))
    rows = even_part(channels, max(budget // (row * samples), least), _TILE_CHANNELS)
    for first in range(0, batch, samples):
        yield slice(first, first + samples), [slice(c, min(c + rows, channels)) for c in range(0, channels, rows)]
