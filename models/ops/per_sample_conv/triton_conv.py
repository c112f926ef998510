"""Per-sample convolution by Triton kernels, on a GPU: an implicit matrix product reads the input in place.

The operators are opaque to torch.compile. The first call for a size times several tiles (Triton's tuner), so that a
CUDA graph can be captured only after it. The kernels have not run on a GPU yet.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import Function
from ..geometry import Geometry
from ..images import empty_images
from .batched import grouped_conv


class Window(NamedTuple):
    """Taps, stride, padding and dilation, under the names that the kernels give them."""

    taps_h: int
    taps_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        room_h = height + 2 * self.padding_h - self.dilation_h * (self.taps_h - 1) - 1
        room_w = width + 2 * self.padding_w - self.dilation_w * (self.taps_w - 1) - 1
        if room_h < 0 or room_w < 0:
            raise ValueError(f"an input of {height} × {width} is too small for a convolution with {self}")
        return room_h // self.stride_h + 1, room_w // self.stride_w + 1


def triton_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) of one or two dimensions, ungrouped; shapes as `per_sample_conv`.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    x, geometry = geometry.written_out(x)
    if x.ndim == 4:
        return TRITON.apply(geometry, x, weight)
    line = Geometry((1, *geometry.stride), ((0, 0), *geometry.padding), (1, *geometry.dilation), 1)
    return TRITON.apply(line, x.unsqueeze(2), weight.unsqueeze(3)).squeeze(2)  # a line is an image of one row


@torch.compiler.assume_constant_result
def unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors of a type on a type of device; None if they can."""
    return _unavailable(device, dtype)


@functools.cache
def _unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"Triton's kernels run on CUDA devices, not on {device!r}"
    try:
        from . import triton_kernels
    except ImportError:
        return "Triton is not installed"
    if dtype == torch.float64 and not triton_kernels.MULTIPLIES_DOUBLE:
        return "Triton multiplies float64 from its version 3.5 on"
    if device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or more"
    return None


class _Triton(Function):
    name = "triton"
    fast = True

    def compute(self, arguments: Geometry, x: Tensor, weight: Tensor) -> Tensor:
        return grouped_conv(x, weight, arguments)

    def forward(self, arguments: Geometry, x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, _rows(weight), _window(weight, arguments))

    def gradients(
        self, arguments: Geometry, grad: Tensor, needs: Sequence[bool], x: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        window = _window(weight, arguments)
        grad_x = gradient_of_x(grad, x, _rows(weight), window) if needs[0] else None
        if not needs[1]:
            return grad_x, None
        rows = gradient_of_kernels(grad, x, window)
        return grad_x, rows.transpose(2, 3).reshape(weight.shape)


TRITON = _Triton()


def _rows(weight: Tensor) -> Tensor:
    """(B, Cout, Cin, *k) → (B, Cout, taps, Cin)."""
    return weight.flatten(3).transpose(2, 3).contiguous()


def _window(weight: Tensor, geometry: Geometry) -> list[int]:
    padding = [before for before, _ in geometry.padding]
    return [*weight.shape[3:], *geometry.stride, *padding, *geometry.dilation]


@torch.library.custom_op("kernelwarehouse::triton_conv", mutates_args=())
def convolve(x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """y (B, Cout, height, width) of images x (B, Cin, height, width), kernels (B, Cout, taps, Cin), and a `Window`."""
    from . import triton_kernels

    y = empty_images(x, kernels.shape[1], Window(*window).positions(*x.shape[2:]))
    flat = y.flatten(2)
    batch, channels, positions = flat.shape
    sizes = *x.shape[2:], y.shape[3], positions, x.shape[1], channels
    with torch.cuda.device_of(x):
        _launchable(triton_kernels.convolve)[_grid(batch, {"block_o": channels, "block_p": positions})](
            x, kernels, flat, *sizes, *x.stride(), *flat.stride(), **_constants(window, batch, positions)
        )
    return y


@convolve.register_fake
def _(x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    return empty_images(x, kernels.shape[1], Window(*window).positions(*x.shape[2:]))


@torch.library.custom_op("kernelwarehouse::triton_conv_gradient_of_x", mutates_args=())
def gradient_of_x(grad: Tensor, x: Tensor, kernels: Tensor, window: Sequence[int]) -> Tensor:
    """The gradient of x, given that of y."""
    from . import triton_kernels

    grad_x, w = torch.empty_like(x), Window(*window)
    batch, channels, height, width = x.shape
    pixels = math.ceil(height / w.stride_h) * math.ceil(width / w.stride_w)
    sizes = height, width, *grad.shape[2:], channels, grad.shape[1]
    programs = w.stride_h * w.stride_w * batch
    with torch.cuda.device_of(x):
        _launchable(triton_kernels.convolve_transposed)[_grid(programs, {"block_c": channels, "block_p": pixels})](
            grad, kernels, grad_x, *sizes, *grad.stride(), *grad_x.stride(), **_constants(window, batch, pixels)
        )
    return grad_x


@gradient_of_x.register_fake
def _(_grad: Tensor, x: Tensor, _kernels: Tensor, _window: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kernelwarehouse::triton_conv_gradient_of_kernels", mutates_args=())
def gradient_of_kernels(grad: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    """The gradient of the kernels, (B, Cout, taps, Cin), given that of y."""
    from . import triton_kernels

    w, batch, channels, positions = Window(*window), len(x), grad.shape[1], grad.shape[2:].numel()
    grad_kernels = x.new_empty(batch, channels, w.taps_h * w.taps_w, x.shape[1])
    sizes = *x.shape[2:], grad.shape[3], positions, x.shape[1], channels
    blocks = {"block_o": channels, "block_c": x.shape[1]}
    with torch.cuda.device_of(x):
        _launchable(triton_kernels.correlate)[_grid(w.taps_h * w.taps_w * batch, blocks)](
            x, grad, grad_kernels, *sizes, *x.stride(), *grad.stride(), **_constants(window, batch, positions)
        )
    return grad_kernels


@gradient_of_kernels.register_fake
def _(grad: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    return x.new_empty(len(x), grad.shape[1], window[0] * window[1], x.shape[1])


def _launchable(kernel: Any) -> Any:
    """A kernel, whose tuner adds arguments that a type checker misses."""
    return kernel


def _grid(programs: int, extents: dict[str, int]) -> Callable[[dict[str, int]], tuple[int]]:
    """Cover the extents with blocks, `programs` times; in one dimension, since the others are limited to 65,535."""
    return lambda blocks: (programs * math.prod(math.ceil(size / blocks[name]) for name, size in extents.items()),)


def precision() -> str:
    """In which the kernels multiply single precision: as torch's products are told to."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _constants(window: Sequence[int], samples: int, positions: int) -> dict[str, int | str]:
    return {
        **Window(*window)._asdict(),
        "precision": precision(),
        "size_class": 64 * positions.bit_length() + samples.bit_length(),
    }
