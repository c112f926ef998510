"""The depthwise convolution with mixed kernels in C++, for a CPU.

Every channel is a group, so a cell is some neighbouring channels at one position of the kernel, and mixtures that
follow each other are kernels with channels last: one product of α and cells makes them all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dynamic_conv import convolve_depthwise, depthwise_gradient_of_kernels, depthwise_gradient_of_x
from ..geometry import Geometry
from ..native import call, operator, window_of
from .partition import Partition


def depthwise_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b, c] = conv(x[b, c], W[b, c]); the gradient is of first order only.

    Args:
        alpha: α, (B, m, n), of the type that x is summed in.
        cells: (n, cout, 1, *ones), of that type.
        x: (B, C, *spatial), of a type that `can_run`.
        partition: How the kernel (C, 1, *k) is cut.
        geometry: The convolution's arguments.

    Returns:
        (B, C, *output spatial), channels last in memory if x is.
    """
    x, padding = geometry.split_padding(x)
    operands = alpha, channels_together(cells), x, window_of(partition.kernel[2:], geometry, padding)
    return _MixedDepthwise.apply(*operands) if torch.is_grad_enabled() else convolve(*operands)


def channels_together(cells: Tensor) -> Tensor:
    """(n, cout, 1, *ones) → (cout, n)."""
    return cells.flatten(1).transpose(0, 1)


def convolve(alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    """y of α (B, m, n), cells (cout, n), and a `window_of` the kernel."""
    return convolve_depthwise(x, kernels(alpha, cells, x), window)


def kernels(alpha: Tensor, cells: Tensor, x: Tensor) -> Tensor:
    """(B, taps, C)."""
    return _mix(alpha.flatten(0, 1), cells).view(x.shape[0], -1, x.shape[1])


def gradients_of_mixing(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, mixed: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Those of α and of the cells, given that of y and the `kernels`."""
    grad_mixtures = depthwise_gradient_of_kernels(grad, x, mixed, window).view(-1, cells.shape[0])
    return (grad_mixtures @ cells).view(alpha.shape), grad_mixtures.transpose(0, 1) @ alpha.flatten(0, 1)


class _MixedDepthwise(torch.autograd.Function):
    """Of cells (cout, n); kernels, which are a fifth of a small image, are mixed again for backward."""

    @staticmethod
    def forward(ctx, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]):
        ctx.save_for_backward(alpha, cells, x)
        ctx.window = window
        return convolve(alpha, cells, x, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, cells, x = ctx.saved_tensors
        mixed = kernels(alpha, cells, x)
        grad_x = depthwise_gradient_of_x(grad, x, mixed, ctx.window, None) if ctx.needs_input_grad[2] else None
        return *gradients_of_mixing(grad, alpha, cells, x, mixed, ctx.window), grad_x, None


def _empty_mixtures(alpha: Tensor, cells: Tensor) -> Tensor:
    return alpha.new_empty(alpha.shape[0], cells.shape[0])


@operator("mix_depthwise", fake=_empty_mixtures)
def _mix(alpha: Tensor, cells: Tensor) -> Tensor:
    mixtures = _empty_mixtures(alpha, cells)
    call("mix_depthwise", (*alpha.shape, cells.shape[0]), (alpha.contiguous(), cells.contiguous(), mixtures))
    return mixtures
