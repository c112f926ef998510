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
        x, kernels = ctx.saved_tensors
        needs_x, needs_kernels, _ = ctx.needs_input_grad
        grad_x = depthwise_gradient_of_x(grad, x, kernels, ctx.window, None) if needs_x else None
        return grad_x, depthwise_gradient_of_kernels(grad, x, kernels, ctx.window) if needs_kernels else None, None


def _empty_output(x: Tensor, _kernels: Tensor, window: Sequence[int]) -> Tensor:
    return empty_images(x, x.shape[1], output_size(x.shape[2:], window))


@operator("depthwise", fake=_empty_output)
def convolve_depthwise(x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """y (B, C, *output spatial) of kernels (B, taps, C), of the type in which x is summed, and a `window_of` them."""
    y = _empty_output(x, kernels, window)
    values = room_for_pixels(y)
    call("depthwise", [_sizes(x, y, window)], (kernels.contiguous(), pixels(x), values), x.dtype)
    return from_pixels(values, y)


def _like_x(_grad: Tensor, x: Tensor, _kernels: Tensor, _window: Sequence[int], _each: Tensor | None) -> Tensor:
    return empty_images(x, x.shape[1], x.shape[2:])


@operator("depthwise_gradient_of_x", fake=_like_x)
def depthwise_gradient_of_x(
    grad: Tensor, x: Tensor, kernels: Tensor, window: Sequence[int], each: Tensor | None
) -> Tensor:
    """That of x, given that of `convolve_depthwise`'s result and what every pixel receives besides, `each` (B, C)."""
    grad_x = _like_x(grad, x, kernels, window, each)
    values = room_for_pixels(grad_x)
    operands = kernels.contiguous(), pixels(grad), each, values
    call("depthwise_gradient_of_x", [_sizes(x, grad, window)], operands, x.dtype)
    return from_pixels(values, grad_x)


def _like_kernels(_grad: Tensor, _x: Tensor, kernels: Tensor, _window: Sequence[int]) -> Tensor:
    return torch.empty_like(kernels, memory_format=torch.contiguous_format)


@operator("depthwise_gradient_of_kernels", fake=_like_kernels)
def depthwise_gradient_of_kernels(grad: Tensor, x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """That of the kernels."""
    grad_kernels = _like_kernels(grad, x, kernels, window)
    call("depthwise_gradient_of_kernels", [_sizes(x, grad, window)], (pixels(x), pixels(grad), grad_kernels))
    return grad_kernels


def _sizes(x: Tensor, y: Tensor, window: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return problem((x.shape[0], 1, 1, 0, x.shape[1], x.shape[1]), x.shape[2:], y.shape[2:], window)
