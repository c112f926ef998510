"""The depthwise convolution with mixed kernels in C++, for a CPU.

Every channel is a group, so a cell is some neighbouring channels at one position of the kernel, and mixtures that
follow each other are kernels with channels last: one product of α and cells makes them all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dynamic_conv import convolve_depthwise, depthwise_gradients
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
    operands = alpha, cells.flatten(1).transpose(0, 1), x, window_of(partition.kernel[2:], geometry, padding)
    return _MixedDepthwise.apply(*operands) if torch.is_grad_enabled() else _convolve(*operands)


def _convolve(alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    return convolve_depthwise(x, _kernels(alpha, cells, x), window)


def _kernels(alpha: Tensor, cells: Tensor, x: Tensor) -> Tensor:
    return _mix(alpha.flatten(0, 1), cells).view(x.shape[0], -1, x.shape[1])


class _MixedDepthwise(torch.autograd.Function):
    """Of cells (cout, n); kernels, which are a fifth of a small image, are mixed again for backward."""

    @staticmethod
    def forward(ctx, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]):
        ctx.save_for_backward(alpha, cells, x)
        ctx.window = window
        return _convolve(alpha, cells, x, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, cells, x = ctx.saved_tensors
        grad_x, grad_kernels = depthwise_gradients(grad, x, _kernels(alpha, cells, x), ctx.window)
        grad_mixtures = grad_kernels.view(-1, cells.shape[0])
        grad_alpha = (grad_mixtures @ cells).view(alpha.shape)
        return grad_alpha, grad_mixtures.transpose(0, 1) @ alpha.flatten(0, 1), grad_x, None


def _empty_mixtures(alpha: Tensor, cells: Tensor) -> Tensor:
    return alpha.new_empty(alpha.shape[0], cells.shape[0])


@operator("mix_depthwise", fake=_empty_mixtures)
def _mix(alpha: Tensor, cells: Tensor) -> Tensor:
    mixtures = _empty_mixtures(alpha, cells)
    call("mix_depthwise", (*alpha.shape, cells.shape[0]), (alpha.contiguous(), cells.contiguous(), mixtures))
    return mixtures
