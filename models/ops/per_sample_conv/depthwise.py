"""Depthwise convolution with a kernel for every sample in C++, for a CPU: inputs are read where they lie.

Torch's convolution with a group for every channel of every sample needs channels first, and is much slower for its
gradients than for its outputs.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..context import as_type
from ..cpu import call, from_pixels, operator, output_size, pixels, problem, room_for_pixels, window_of
from ..derivatives import Function
from ..geometry import Geometry
from ..images import empty_images
from .batched import grouped_conv


def depthwise_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b, c] = conv(x[b, c], W[b, c]), in single precision where x is in half.

    Args:
        x: (B, C, *spatial), on a CPU where the C++ runs.
        weight: (B, C, 1, *kernel); best if channels are last in memory.
        geometry: The convolution's arguments, with a group for each channel.

    Returns:
        (B, C, *output spatial), channels last in memory if x is.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    kind = x.dtype if x.dtype == torch.float64 else torch.float32
    padded, geometry = geometry.written_out(as_type(x, kind))
    return as_type(DEPTHWISE.apply(geometry, padded, as_type(weight, kind)), x.dtype)


def depthwise_gradients(
    grad: Tensor, needs: Sequence[bool], x: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and the kernels, as needed, given that of y; padding must be equal zeros."""
    kind = x.dtype if x.dtype == torch.float64 else torch.float32
    operands = as_type(grad, kind), needs, as_type(x, kind), as_type(weight, kind)
    grad_x, grad_weight = DEPTHWISE.gradients(geometry, *operands)
    return (
        None if grad_x is None else as_type(grad_x, x.dtype),
        None if grad_weight is None else as_type(grad_weight, weight.dtype),
    )


def is_depthwise(weight: Tensor, geometry: Geometry) -> bool:
    """Whether every channel is convolved by itself, to one channel, with kernels (B, Cout, Cin/groups, *kernel)."""
    return weight.shape[1] == geometry.groups and weight.shape[2] == 1


class _Depthwise(Function):
    name = "depthwise"
    fast = True

    def compute(self, arguments: Geometry, x: Tensor, weight: Tensor) -> Tensor:
        return grouped_conv(x, weight, arguments)

    def forward(self, arguments: Geometry, x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, _rows(weight), _window(weight, arguments))

    def gradients(
        self, arguments: Geometry, grad: Tensor, needs: Sequence[bool], x: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        window, kernels = _window(weight, arguments), _rows(weight)
        grad_x = gradient_of_x(grad, x, kernels, window) if needs[0] else None
        if not needs[1]:
            return grad_x, None
        return grad_x, gradient_of_kernels(grad, x, kernels, window).transpose(1, 2).reshape(weight.shape)


DEPTHWISE = _Depthwise()


def _rows(weight: Tensor) -> Tensor:
    """(B, C, 1, *kernel) → (B, taps, C)."""
    return weight.squeeze(2).flatten(2).transpose(1, 2)


def _window(weight: Tensor, geometry: Geometry) -> list[int]:
    return window_of(weight.shape[3:], geometry, [before for before, _ in geometry.padding])


def _empty_output(x: Tensor, _kernels: Tensor, window: Sequence[int]) -> Tensor:
    return empty_images(x, x.shape[1], output_size(x.shape[2:], window))


def _forward_macs(x: Sequence[int], kernels: Sequence[int], window: Sequence[int]) -> int:
    return x[0] * x[1] * math.prod(output_size(x[2:], window)) * kernels[1]


def _gradient_macs(grad: Sequence[int], _x: Sequence[int], kernels: Sequence[int], _window: Sequence[int]) -> int:
    return math.prod(grad) * kernels[1]


@operator("depthwise", fake=_empty_output, macs=_forward_macs)
def convolve(x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """y (B, C, *output spatial) of kernels (B, taps, C), and a `window_of` them."""
    y = _empty_output(x, kernels, window)
    values = room_for_pixels(y)
    call("depthwise", [_sizes(x, y, window)], (kernels.contiguous(), pixels(x), values))
    return from_pixels(values, y)


def _like_x(_grad: Tensor, x: Tensor, _kernels: Tensor, _window: Sequence[int]) -> Tensor:
    return empty_images(x, x.shape[1], x.shape[2:])


@operator("depthwise_gradient_of_x", fake=_like_x, macs=_gradient_macs)
def gradient_of_x(grad: Tensor, x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """That of x, given that of the result of `convolve`."""
    grad_x = _like_x(grad, x, kernels, window)
    values = room_for_pixels(grad_x)
    call("depthwise_gradient_of_x", [_sizes(x, grad, window)], (kernels.contiguous(), pixels(grad), values))
    return from_pixels(values, grad_x)


def _like_kernels(_grad: Tensor, _x: Tensor, kernels: Tensor, _window: Sequence[int]) -> Tensor:
    return torch.empty_like(kernels, memory_format=torch.contiguous_format)


@operator("depthwise_gradient_of_kernels", fake=_like_kernels, macs=_gradient_macs)
def gradient_of_kernels(grad: Tensor, x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """That of the kernels (B, taps, C)."""
    grad_kernels = _like_kernels(grad, x, kernels, window)
    call("depthwise_gradient_of_kernels", [_sizes(x, grad, window)], (pixels(x), pixels(grad), grad_kernels))
    return grad_kernels


def _sizes(x: Tensor, y: Tensor, window: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return problem((x.shape[0], 1, 1, 0, x.shape[1], x.shape[1]), x.shape[2:], y.shape[2:], window)
