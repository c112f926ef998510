"""The convolution with mixed kernels in C++, for a CPU: kernels live in the cache, and inputs are read in place.

It does what `streamed` does without its copies: no columns are written, and what a core mixes at once fits in its own
cache. For cells that span one position of the kernel, in single and double precision, and in bfloat16 where the
processor multiplies that: α, images, kernels and their gradients are rounded to it then; sums and the gradients of
cells are not.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dynamic_conv import dynamic_conv_from_geometry
from ..geometry import Geometry
from ..images import add_bias, empty_images
from ..native import (
    call,
    can_run,
    from_pixels,
    operator,
    output_size,
    pixels,
    problem,
    room_for_pixels,
    sum_type,
    window_of,
)
from .depthwise import depthwise_conv
from .mixing import by_output_blocks, mix
from .partition import Partition
from .streamed import streamed_conv


def native_conv(
    alpha: Tensor,
    cells: Tensor,
    x: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias (Cout,); the rest as `streamed_conv` has it, or depthwise.

    Others take over where this cannot run, which is said once.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    kind = sum_type(x.dtype)
    if not can_run(x.device.type, x.dtype, warn=True):
        if geometry.groups > 1:
            return dynamic_conv_from_geometry(x, mix(alpha, cells, partition), bias, geometry)
        return add_bias(streamed_conv(alpha, cells, x, partition, geometry), bias)
    if geometry.groups > 1:
        return add_bias(depthwise_conv(alpha.to(kind), cells.to(kind), x, partition, geometry), bias)
    if not in_pairs(x, partition):
        return native_conv(alpha.float(), cells, x.float(), partition, geometry, bias).to(x.dtype)
    x, padding = geometry.split_padding(x)
    alpha = by_output_blocks(alpha, partition)
    window = window_of(partition.kernel[2:], geometry, padding)
    bias = None if bias is None else bias.to(kind)
    if not torch.is_grad_enabled():
        if not mixes_natively(cells.dtype, x.dtype, x.device.type):
            cells = cells.to(kind)
        return convolve(alpha, cells.transpose(0, 1), x, bias, window, False)
    return _NativeConv.apply(alpha, cells.to(kind), x, bias, window)


def native_folded_conv(
    alpha: Tensor,
    products: Tensor,
    x: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """The same with W[b] mixed from products of attention and cells (see `folded`); without a gradient.

    Args:
        alpha: s [h; 1], (B, m, r + 1).
        products: G, (blocks of output channels, cout, r + 1, taps · input blocks · cin), of the type of x or, where
            that is bfloat16, in single precision.
        x: (B, Cin, *spatial), of a type that `can_run`, as α.
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
        bias: (Cout,), if any.
    """
    if not in_pairs(x, partition):
        return native_folded_conv(alpha.float(), products.float(), x.float(), partition, geometry, bias).to(x.dtype)
    x, padding = geometry.split_padding(x)
    window = window_of(partition.kernel[2:], geometry, padding)
    bias = None if bias is None else bias.to(sum_type(x.dtype))
    return convolve(by_output_blocks(alpha, partition), products.flatten(0, 1), x, bias, window, True)


def mixes_natively(values: torch.dtype, x: torch.dtype, device: str) -> bool:
    """Whether cells or products of one type are read as they are for images of another, on a type of device."""
    return can_run(device, x) and (values == sum_type(x) or (values, sum_type(x)) == (torch.bfloat16, torch.float32))


def in_pairs(x: Tensor, partition: Partition) -> bool:
    """Whether channels can be read as they must be in bfloat16, two at a time."""
    return x.dtype != torch.bfloat16 or all(channels % 2 == 0 for channels in partition.cell[:2])


class _NativeConv(torch.autograd.Function):
    """`native_conv` of α (B, blocks of output channels, taps · blocks of input channels, n)."""

    @staticmethod
    def forward(ctx, alpha: Tensor, cells: Tensor, x: Tensor, bias: Tensor | None, window: Sequence[int]):
        ctx.save_for_backward(alpha, cells, x)
        ctx.window = window
        return convolve(alpha, cells.transpose(0, 1), x, bias, window, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, cells, x = ctx.saved_tensors
        needs_alpha, needs_cells, needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_alpha = grad_cells = grad_x = None
        grad_bias = gradient_of_bias(grad) if needs_bias else None
        if needs_x:
            grad_x = gradient_of_x(grad, alpha, cells, x, ctx.window, None)
        if needs_alpha or needs_cells:
            grad_alpha, grad_cells = gradients_of_mixing(grad, alpha, cells, x, ctx.window)
        return grad_alpha if needs_alpha else None, grad_cells if needs_cells else None, grad_x, grad_bias, None


def gradient_of_bias(grad: Tensor) -> Tensor:
    """(Cout,), of the type that is summed in, given that of y."""
    return grad.sum((0, *range(2, grad.ndim)), dtype=sum_type(grad.dtype))


def _output(
    alpha: Tensor, rows: Tensor, x: Tensor, _bias: Tensor | None, window: Sequence[int], folded: bool
) -> Tensor:
    size = output_size(x.shape[2:], window)
    return empty_images(x, rows.shape[0] * (1 if folded else alpha.shape[1]), size)


@operator("native_conv", fake=_output)
def convolve(
    alpha: Tensor, rows: Tensor, x: Tensor, bias: Tensor | None, window: Sequence[int], folded: bool
) -> Tensor:
    """Of cells by output channel, (cout, n, cin, *ones), or of products, (Cout, r + 1, taps · input blocks · cin).

    The bias is of the type that is summed in.
    """
    y = _output(alpha, rows, x, bias, window, folded)
    values = room_for_pixels(y)
    sizes = _problem(alpha, x, y, window, folded)
    function = "convolve_rounded" if rows.dtype == torch.bfloat16 else "convolve"
    bias = None if bias is None else bias.contiguous()
    call(function, [sizes], (_coefficients(alpha), rows.contiguous(), pixels(x), bias, values))
    return from_pixels(values, y)


def _like_x(
    _grad: Tensor, _alpha: Tensor, _cells: Tensor, x: Tensor, _window: Sequence[int], _each: Tensor | None
) -> Tensor:
    return empty_images(x, x.shape[1], x.shape[2:])


@operator("native_conv_gradient_of_x", fake=_like_x)
def gradient_of_x(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int], each: Tensor | None
) -> Tensor:
    """That of x, given that of y and what every pixel receives besides, `each` (B, Cin)."""
    grad_x = _like_x(grad, alpha, cells, x, window, each)
    values = room_for_pixels(grad_x)
    operands = _coefficients(alpha), cells.transpose(0, 1).contiguous(), pixels(grad), each, values
    call("gradient_of_x", [_problem(alpha, x, grad, window)], operands)
    return from_pixels(values, grad_x)


def _like_mixing(
    _grad: Tensor, alpha: Tensor, cells: Tensor, _x: Tensor, _window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(alpha, memory_format=torch.contiguous_format), _like_cells(cells)


@operator("native_conv_gradients_of_mixing", fake=_like_mixing)
def gradients_of_mixing(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Those of α (B, blocks of output channels, parts, n) and of the cells (n, cout, cin, *ones), given that of y."""
    grad_cells = _like_cells(cells)
    return _gradients_of_mixing(grad, alpha, cells, x, window, grad_cells, False), grad_cells


def _like_alpha(
    _grad: Tensor, alpha: Tensor, _cells: Tensor, _x: Tensor, _window: Sequence[int], _total: Tensor
) -> Tensor:
    return torch.empty_like(alpha, memory_format=torch.contiguous_format)


@operator("native_conv_add_gradients_of_mixing", fake=_like_alpha, changes=["total"])
def add_gradients_of_mixing(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int], total: Tensor
) -> Tensor:
    """The same, with that of the cells added to a total, which `gradients_of_mixing` made of another layer's."""
    return _gradients_of_mixing(grad, alpha, cells, x, window, total, True)


def _gradients_of_mixing(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int], grad_cells: Tensor, add: bool
) -> Tensor:
    # Every thread sums what it finds; the length of a row is rounded up to whole registers, of at most 16 values.
    threads, n = torch.get_num_threads(), math.ceil(len(cells) / 16) * 16
    grad_alpha = alpha.new_zeros(threads, *alpha.shape[:3], n, dtype=cells.dtype)
    operands = _coefficients(alpha), cells.transpose(0, 1).contiguous(), pixels(x), pixels(grad)
    results = grad_alpha, grad_cells.transpose(0, 1)
    call("gradients_of_mixing", [_problem(alpha, x, grad, window), int(add)], operands + results)
    return grad_alpha.sum(0)[..., : len(cells)].contiguous().to(alpha.dtype)


def _coefficients(alpha: Tensor) -> Tensor:
    """α in memory; in bfloat16 with an even number of values for each mixture."""
    odd = alpha.dtype == torch.bfloat16 and alpha.shape[3] % 2
    return F.pad(alpha, (0, 1)) if odd else alpha.contiguous()


def _like_cells(cells: Tensor) -> Tensor:
    """With rows together, as `Warehouses` lays them out; no view, to which autograd could not add in place."""
    n, _, *rest = cells.shape
    row = math.prod(rest)
    strides = [math.prod(rest[i + 1 :]) for i in range(len(rest))]
    return cells.new_empty_strided(cells.shape, (row, n * row, *strides))


def _problem(
    alpha: Tensor, x: Tensor, y: Tensor, window: Sequence[int], folded: bool = False
) -> ctypes.Array[ctypes.c_int64]:
    """The sizes for α (B, blocks of output channels, parts, n)."""
    _, alpha_blocks, parts, n = alpha.shape
    blocks_out, blocks_in = 1 if folded else alpha_blocks, parts // math.prod(window[:3])
    counts = x.shape[0], blocks_out, blocks_in, n, y.shape[1] // blocks_out, x.shape[1] // blocks_in
    return problem(counts, x.shape[2:], y.shape[2:], window, alpha_blocks if folded else 0)
