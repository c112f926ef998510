"""Mixed kernels and an implicit matrix product: on a GPU the convolution reads the input in place, by Triton kernels.

Streaming copies what every tap reads into columns, k² times the input, and makes two launches for every tile. Here the
kernels of as many samples as `_CHUNK_BYTES` hold are mixed by one batched product, and one launch convolves them. The
backward pass mixes them again.

The operators are opaque to torch.compile, which therefore sees one graph whatever the number of chunks. The first call
for a size times several tiles (Triton's tuner), so that a CUDA graph can be captured only after it.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dynamic_conv import even_part
from ..geometry import Geometry
from ..images import empty_images
from .mixing import by_output_blocks, mix_rows
from .partition import Partition
from .streamed import streamed_conv

_CHUNK_BYTES = 256 << 20  # of the kernels that exist at once: samples enough to fill a GPU with tiles of small maps


def fused_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]); arguments, result and order of the gradient as `streamed_conv`.

    Streaming takes over in 3-D, and where the kernels cannot run, which is said once.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    if len(geometry.stride) > 2 or not can_run(x.device.type, x.dtype, warn=True):
        return streamed_conv(alpha, cells, x, partition, geometry)
    x, padding = geometry.split_padding(x)
    taps, alpha = partition.kernel[2:], by_output_blocks(alpha, partition)
    if x.ndim == 4:
        return _FusedConv.apply(alpha, cells, x, (*taps, *geometry.stride, *padding, *geometry.dilation))
    window = (1, *taps, 1, *geometry.stride, 0, *padding, 1, *geometry.dilation)
    return _FusedConv.apply(alpha, cells, x.unsqueeze(2), window).squeeze(2)  # a line is an image of one row


@torch.compiler.assume_constant_result
def can_run(device: str, dtype: torch.dtype, warn: bool = False) -> bool:
    """Whether the kernels can run on tensors of a type on a type of device; if not, a warning can say why, once."""
    obstacle = _obstacle(device, dtype)
    if warn and obstacle:
        _warn_once(f"implementation 'fused' gives way to 'streamed': {obstacle}")
    return obstacle is None


@functools.cache
def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"its kernels run on CUDA devices, not on {device!r}"
    try:
        from . import fused_kernels
    except ImportError:
        return "Triton is not installed"
    if dtype == torch.float64 and not fused_kernels.MULTIPLIES_DOUBLE:
        return "Triton multiplies float64 from its version 3.5 on"
    if device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or more"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class _Window(NamedTuple):
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


class _FusedConv(torch.autograd.Function):
    """`fused_conv` of α (B, blocks of output channels, taps · blocks of input channels, n) and images."""

    @staticmethod
    def forward(ctx, alpha: Tensor, cells: Tensor, x: Tensor, window: tuple[int, ...]):
        ctx.save_for_backward(alpha, cells, x)
        ctx.window = window
        return _convolve(alpha, cells, x, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, cells, x = ctx.saved_tensors
        needs_alpha, needs_cells, needs_x, _ = ctx.needs_input_grad
        grad_alpha = grad_cells = grad_x = None
        if needs_x:
            grad_x = _gradient_of_x(grad, alpha, cells, x, ctx.window)
        if needs_alpha or needs_cells:
            grad_alpha, grad_cells = _gradients_of_kernels(grad, alpha, cells, x, ctx.window)
        return grad_alpha if needs_alpha else None, grad_cells if needs_cells else None, grad_x, None


@torch.library.custom_op("kernelwarehouse::fused_conv", mutates_args=())
def _convolve(alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    from . import fused_kernels

    y = empty_images(x, alpha.shape[1] * cells.shape[1], _Window(*window).positions(*x.shape[2:]))
    flat = y.flatten(2)
    channels, positions = flat.shape[1:]
    with torch.cuda.device_of(x):
        for samples in _chunks(alpha, cells):
            kernels = _mix(alpha[samples], cells)
            fused_kernels.convolve[_grid(len(x[samples]), {"block_o": channels, "block_p": positions})](
                x[samples],
                kernels,
                flat[samples],
                *x.shape[2:],
                y.shape[3],
                positions,
                x.shape[1],
                channels,
                cells.shape[1],
                *x.stride(),
                *kernels.stride()[:3],
                *flat.stride(),
                **_constants(window, samples, positions),
            )
    return y


@_convolve.register_fake
def _(alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    return empty_images(x, alpha.shape[1] * cells.shape[1], _Window(*window).positions(*x.shape[2:]))


@torch.library.custom_op("kernelwarehouse::fused_conv_gradient_of_x", mutates_args=())
def _gradient_of_x(grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    from . import fused_kernels

    grad_x = torch.empty_like(x)
    w = _Window(*window)
    channels, height, width = x.shape[1:]
    pixels = math.ceil(height / w.stride_h) * math.ceil(width / w.stride_w)
    with torch.cuda.device_of(x):
        for samples in _chunks(alpha, cells):
            kernels = _mix(alpha[samples], cells)
            programs = w.stride_h * w.stride_w * len(x[samples])
            fused_kernels.convolve_transposed[_grid(programs, {"block_c": channels, "block_p": pixels})](
                grad[samples],
                kernels,
                grad_x[samples],
                height,
                width,
                *grad.shape[2:],
                channels,
                grad.shape[1],
                cells.shape[1],
                *grad.stride(),
                *kernels.stride()[:3],
                *grad_x.stride(),
                **_constants(window, samples, pixels),
            )
    return grad_x


@_gradient_of_x.register_fake
def _(_grad: Tensor, _alpha: Tensor, _cells: Tensor, x: Tensor, _window: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kernelwarehouse::fused_conv_gradients_of_kernels", mutates_args=())
def _gradients_of_kernels(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    from . import fused_kernels

    grad_alpha = torch.empty_like(alpha, memory_format=torch.contiguous_format)
    grad_cells = torch.zeros_like(cells)
    flat_cells = cells.flatten(1).to(alpha.dtype)
    channels, positions = grad.shape[1], grad.shape[2:].numel()
    w = _Window(*window)
    blocks = {"block_o": channels, "block_c": x.shape[1]}
    with torch.cuda.device_of(x):
        for samples in _chunks(alpha, cells):
            coefficients = alpha[samples].flatten(0, 2)
            mixtures = alpha.new_empty(len(coefficients), flat_cells.shape[1])
            fused_kernels.correlate[_grid(w.taps_h * w.taps_w * len(x[samples]), blocks)](
                x[samples],
                grad[samples],
                mixtures,
                *x.shape[2:],
                grad.shape[3],
                positions,
                x.shape[1],
                channels,
                cells.shape[2],
                cells.shape[1],
                *x.stride(),
                *grad.stride(),
                **_constants(window, samples, positions),
            )
            grad_alpha[samples] = torch.mm(mixtures, flat_cells.mT).view_as(grad_alpha[samples])
            grad_cells += torch.mm(coefficients.mT, mixtures).view_as(cells)
    return grad_alpha, grad_cells


@_gradients_of_kernels.register_fake
def _(_grad: Tensor, alpha: Tensor, cells: Tensor, _x: Tensor, _window: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(alpha, memory_format=torch.contiguous_format), torch.empty_like(cells)


def _mix(alpha: Tensor, cells: Tensor) -> Tensor:
    """(B, blocks, parts, n), (n, cout, cin, *ones) → (cout, B, blocks, parts · cin)."""
    return mix_rows(alpha.flatten(0, 2), cells).view(cells.shape[1], *alpha.shape[:2], -1)


def _chunks(alpha: Tensor, cells: Tensor) -> Iterator[slice]:
    """Slices of samples, as equal as can be, whose kernels take at most `_CHUNK_BYTES`."""
    kernel = alpha.shape[1] * alpha.shape[2] * cells[0].numel() * alpha.element_size()
    samples = even_part(len(alpha), _CHUNK_BYTES // kernel)
    for first in range(0, len(alpha), samples):
        yield slice(first, min(first + samples, len(alpha)))


def _grid(programs: int, extents: dict[str, int]) -> Callable[[dict[str, int]], tuple[int]]:
    """Cover the extents with blocks, `programs` times; in one dimension, since the others are limited to 65,535."""
    return lambda blocks: (programs * math.prod(math.ceil(size / blocks[name]) for name, size in extents.items()),)


def precision() -> str:
    """In which the kernels multiply single precision: as torch's products are told to."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _constants(window: Sequence[int], samples: slice, positions: int) -> dict[str, int | str]:
    return {
        **_Window(*window)._asdict(),
        "precision": precision(),
        "size_class": 64 * positions.bit_length() + (samples.stop - samples.start).bit_length(),
    }
