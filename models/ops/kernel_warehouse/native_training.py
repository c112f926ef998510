"""A layer in training as one function of autograd, in C++ for a CPU.

The attention and the convolution read the same input, and each sends back a gradient of it. Here the attention's, one
number for each channel, is added while the convolution's is written; between two functions autograd would read and
write that once more.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dynamic_conv import depthwise_gradient_of_x
from ..geometry import Geometry
from ..images import add_bias
from ..native import sum_type, window_of
from . import depthwise, native
from .attention import Attention
from .attention_operator import hides_plainly, parameters_of
from .attention_training import attend, gradients, learned, norm_kind
from .mixing import by_output_blocks, by_positions
from .partition import Partition
from .shared import SharedCells


def trains_at_once(attention: Attention, x: Tensor, partition: Partition, geometry: Geometry) -> bool:
    """Whether `native_training` can compute a layer that `attends_at_once` and whose convolution is to be "native"."""
    return (
        x.requires_grad
        and not torch.compiler.is_compiling()
        and hides_plainly(attention)
        and geometry.pads_evenly
        and (geometry.groups > 1 or native.in_pairs(x, partition))
    )


def native_training(
    attention: Attention,
    cells: Tensor,
    x: Tensor,
    temperature: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias with W[b] mixed from the cells by the attention to x[b].

    Args:
        attention: One that `trains_at_once`.
        cells: The warehouse, (n, *cell).
        x: (B, Cin, *spatial), of the type to compute in.
        temperature: τ, a scalar tensor.
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
        bias: (Cout,), if any.

    Returns:
        (B, Cout, *output spatial), channels last in memory if x is; its gradient is of first order only.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    x, padding = geometry.split_padding(x)
    window = window_of(partition.kernel[2:], geometry, padding)
    cells = cells.to(sum_type(x.dtype))
    shared = SharedCells.of(cells) if cells.requires_grad else None
    bias = None if bias is None else bias.to(sum_type(x.dtype))
    convolution = _Depthwise(window) if geometry.groups > 1 else _Tiled(partition, window)
    stand_in = None if shared is None else shared.stand_in
    parameters = parameters_of(attention, temperature)
    return _Layer.apply(convolution, attention, shared, x, cells, stand_in, bias, *parameters)


class _Tiled(NamedTuple):
    """The convolution of `native`: what it does with α (B, m, n), and how it is undone."""

    partition: Partition
    window: list[int]

    def convolve(self, alpha: Tensor, cells: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        alpha = by_output_blocks(alpha.to(x.dtype), self.partition)
        return native.convolve(alpha, cells.transpose(0, 1), x, bias, self.window, False)

    def gradients(
        self, grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, total: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of α and of the cells, added to a total if there is one, and what `gradient_of_x` needs besides."""
        alpha = by_output_blocks(alpha.to(x.dtype), self.partition)
        if total is None:
            grad_alpha, total = native.gradients_of_mixing(grad, alpha, cells, x, self.window)
        else:
            grad_alpha = native.add_gradients_of_mixing(grad, alpha, cells, x, self.window, total)
        return by_positions(grad_alpha, self.partition), total, alpha

    def gradient_of_x(self, grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, each: Tensor) -> Tensor:
        return native.gradient_of_x(grad, alpha, cells, x, self.window, each)


class _Depthwise(NamedTuple):
    """The same of `depthwise`."""

    window: list[int]

    def convolve(self, alpha: Tensor, cells: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        return add_bias(depthwise.convolve(alpha, depthwise.channels_together(cells), x, self.window), bias)

    def gradients(
        self, grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, total: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = depthwise.channels_together(cells)
        kernels = depthwise.kernels(alpha, rows, x)
        grad_alpha, grad_rows = depthwise.gradients_of_mixing(grad, alpha, rows, x, kernels, self.window)
        grad_cells = grad_rows.transpose(0, 1).view_as(cells)
        return grad_alpha, grad_cells if total is None else total.add_(grad_cells), kernels

    def gradient_of_x(self, grad: Tensor, kernels: Tensor, _cells: Tensor, x: Tensor, each: Tensor) -> Tensor:
        return depthwise_gradient_of_x(grad, x, kernels, self.window, each)


class _Layer(torch.autograd.Function):
    """`native_training` of `parameters_of` the attention; the cells' gradient goes to their stand-in."""

    @staticmethod
    def forward(
        ctx,
        convolution: _Tiled | _Depthwise,
        attention: Attention,
        shared: SharedCells | None,
        x: Tensor,
        cells: Tensor,
        _stand_in: Tensor | None,
        bias: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.convolution, ctx.shared, ctx.kind = convolution, shared, norm_kind(attention, len(x))
        alpha, trace = attend(attention, x, parameters)
        # Not buffers: statistics and the temperature change after every step.
        ctx.save_for_backward(x, cells, alpha, trace, *learned(parameters))
        return convolution.convolve(alpha, cells, x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, cells, alpha, trace, *parameters = ctx.saved_tensors
        total = None if ctx.shared is None else ctx.shared.total
        grad_alpha, total, kept = ctx.convolution.gradients(grad, alpha, cells, x, total)
        if ctx.shared is not None:
            ctx.shared.total = total
        each, found = gradients(grad_alpha.to(alpha.dtype), trace, parameters, x.shape, ctx.kind)
        grad_x = ctx.convolution.gradient_of_x(grad, kept, cells, x, each)
        grad_bias = native.gradient_of_bias(grad) if ctx.needs_input_grad[6] else None
        of_fc1, of_norm, of_fc2 = found[:2], found[2:4], found[4:]
        of_attention = *of_fc1, None, None, *of_norm, *of_fc2, None, None
        return None, None, None, grad_x, None, None, grad_bias, *of_attention
