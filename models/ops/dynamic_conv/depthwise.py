"""Depthwise convolution with a kernel for every sample in C++, for a CPU: inputs are read where they lie.

Torch's convolution with a group for every channel of every sample needs channels first, and takes up to 17 times as
long for its gradients as for its outputs. Of images in bfloat16, kernels and sums are in single precision.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..geometry import Geometry
from ..images import empty_images
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
from .batched import grouped_dynamic_conv


def depthwise_dynamic_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b, c] = conv(x[b, c], W[b, c]); the gradient is of first order only.

    What it does not do, see `is_depthwise` and `can_run`, is left to "grouped".

    Args:
        x: (B, C, *spatial).
        weight: (B, C, 1, *kernel); best if channels are last in memory.
        geometry: The convolution's arguments.

    Returns:
        (B, C, *output spatial), channels last in memory if x is.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    if not is_depthwise(weight, geometry) or not can_run(x.device.type, x.dtype, warn=True):
        return grouped_dynamic_conv(x, weight, geometry)
    x, padding = geometry.split_padding(x)
    kernels = weight.to(sum_type(x.dtype)).squeeze(2).flatten(2).transpose(1, 2)
    return _Depthwise.apply(x, kernels, window_of(weight.shape[3:], geometry, padding))


def is_depthwise(weight: Tensor, geometry: Geometry) -> bool:
    """Whether every channel is convolved by itself, to one channel, with kernels (B, Cout, Cin/groups, *kernel)."""
    return weight.shape[1] == geometry.groups and weight.shape[2] == 1


class _Depthwise(torch.autograd.Function):
    """Of kernels (B, taps, C)."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Tensor, window: Sequence[int]):
        ctx.save_for_backward(x, kernels)
        ctx.window = window
        return convolve_depthwise(x, kernels, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *depthwise_gradients(grad, *ctx.saved_tensors, ctx.window), None


def _empty_output(x: Tensor, _kernels: Tensor, window: Sequence[int]) -> Tensor:
    return empty_images(x, x.shape[1], output_size(x.shape[2:], window))


@operator("depthwise", fake=_empty_output)
def convolve_depthwise(x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """y (B, C, *output spatial) of kernels (B, taps, C), of the type in which x is summed, and a `window_of` them."""
    y = _empty_output(x, kernels, window)
    values = room_for_pixels(y)
    call("depthwise", [_sizes(x, y, window)], (kernels.contiguous(), pixels(x), values), x.dtype)
    return from_pixels(values, y)


def _empty_gradients(_grad: Tensor, x: Tensor, kernels: Tensor, _window: Sequence[int]) -> tuple[Tensor, Tensor]:
    grad_kernels = torch.empty_like(kernels, memory_format=torch.contiguous_format)
    return empty_images(x, x.shape[1], x.shape[2:]), grad_kernels


@operator("depthwise_gradients", fake=_empty_gradients)
def depthwise_gradients(grad: Tensor, x: Tensor, kernels: Tensor, window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Those of x and of the kernels, given that of `convolve_depthwise`'s result."""
    sizes, received = [_sizes(x, grad, window)], pixels(grad)
    grad_x, grad_kernels = _empty_gradients(grad, x, kernels, window)
    values = room_for_pixels(grad_x)
    call("depthwise_gradient_of_x", sizes, (kernels.contiguous(), received, values), x.dtype)
    call("depthwise_gradient_of_kernels", sizes, (pixels(x), received, grad_kernels))
    return from_pixels(values, grad_x), grad_kernels


def _sizes(x: Tensor, y: Tensor, window: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return problem((x.shape[0], 1, 1, 0, x.shape[1], x.shape[1]), x.shape[2:], y.shape[2:], window)
