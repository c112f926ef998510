"""The convolution with mixed kernels in C++, for a CPU: kernels live in the cache, and inputs are read in place.

It does what `streamed` does without its copies: no columns are written, and what a core mixes at once fits in its own
cache. For single and double precision, which autocast is not, and cells that span one position of the kernel.
"""

import ctypes
import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...dynamic_conv import Geometry
from ..mixing import by_output_blocks
from ..partition import Partition
from ..streamed import empty_output, streamed_conv
from .library import NativeError, library

__all__ = ["NativeError", "can_run", "library", "native_conv", "native_folded_conv"]

_TYPES = {torch.float32: "float", torch.float64: "double"}


def native_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]); arguments, result and order of the gradient as `streamed_conv`.

    Streaming takes over where this cannot run, which is said once.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    if not can_run(x.device.type, x.dtype, warn=True):
        return streamed_conv(alpha, cells, x, partition, geometry)
    x, padding = geometry.split_padding(x)
    alpha = by_output_blocks(alpha, partition)
    return _NativeConv.apply(alpha, cells.to(x.dtype), x, _window(partition, geometry, padding))


def native_folded_conv(
    hidden: Tensor, scales: Tensor, products: Tensor, x: Tensor, partition: Partition, geometry: Geometry
) -> Tensor:
    """The same with W[b] mixed from products of attention and cells (see `folded`); without a gradient.

    Args:
        hidden: [h; 1], (B, r + 1).
        scales: s, (B, blocks of output channels, taps · input blocks).
        products: G, (blocks of output channels, cout, r + 1, taps · input blocks · cin).
        x: (B, Cin, *spatial), all of one type that `can_run`.
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
    """
    x, padding = geometry.split_padding(x)
    alpha = scales.unsqueeze(3) * hidden[:, None, None]
    return _convolve(alpha, products.flatten(0, 1), x, _window(partition, geometry, padding), True)


def _window(partition: Partition, geometry: Geometry, padding: Sequence[int]) -> list[int]:
    """Kernel size, stride, padding and dilation of three dimensions: an image is a volume of depth 1."""
    missing = 3 - len(padding)
    ones, zeros = [1] * missing, [0] * missing
    taps = partition.kernel[2:]
    return [*ones, *taps, *ones, *geometry.stride, *zeros, *padding, *ones, *geometry.dilation]


@torch.compiler.assume_constant_result
def can_run(device: str, dtype: torch.dtype, warn: bool = False) -> bool:
    """Whether tensors of a type on a type of device can be computed with; if not, a warning can say why, once."""
    obstacle = _obstacle(device, dtype)
    if warn and obstacle:
        _warn_once(f"implementation 'native' gives way to others, slower on a CPU: {obstacle}")
    return obstacle is None


@functools.cache
def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"it runs on a CPU, not on {device!r}"
    if dtype not in _TYPES:
        return f"it computes in {' and '.join(map(str, _TYPES))}, not in {dtype}"
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class _NativeConv(torch.autograd.Function):
    """`native_conv` of α (B, blocks of output channels, taps · blocks of input channels, n)."""

    @staticmethod
    def forward(ctx, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]):
        ctx.save_for_backward(alpha, cells, x)
        ctx.window = window
        return _convolve(alpha, cells.transpose(0, 1), x, window, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        alpha, cells, x = ctx.saved_tensors
        needs_alpha, needs_cells, needs_x, _ = ctx.needs_input_grad
        grad_alpha = grad_cells = grad_x = None
        if needs_x:
            grad_x = _gradient_of_x(grad, alpha, cells, x, ctx.window)
        if needs_alpha or needs_cells:
            grad_alpha, grad_cells = _gradients_of_mixing(grad, alpha, cells, x, ctx.window)
        return grad_alpha if needs_alpha else None, grad_cells if needs_cells else None, grad_x, None


@torch.library.custom_op("kernelwarehouse::native_conv", mutates_args=())
def _convolve(alpha: Tensor, rows: Tensor, x: Tensor, window: Sequence[int], folded: bool) -> Tensor:
    """Of cells by output channel, (cout, n, cin, *ones), or of products, (Cout, r + 1, taps · input blocks · cin)."""
    y = _output(alpha, rows, x, window, folded)
    pixels = _room_for_pixels(y)
    _call("convolve", alpha, rows, (_pixels(x), pixels), _problem(alpha, x, y, window, folded))
    return _from_pixels(pixels, y)


@_convolve.register_fake
def _output(alpha: Tensor, rows: Tensor, x: Tensor, window: Sequence[int], folded: bool) -> Tensor:
    dims = x.ndim - 2
    taps, stride, padding, dilation = (window[i + 3 - dims : i + 3] for i in range(0, 12, 3))
    size = Geometry(stride, tuple((p, p) for p in padding), dilation, 1).output_size(x.shape[2:], taps)
    if min(size) < 1:
        raise ValueError(f"an input of {tuple(x.shape[2:])} is too small for a kernel of {tuple(taps)}")
    return empty_output(x, len(rows) * (1 if folded else alpha.shape[1]), size)[0]


@torch.library.custom_op("kernelwarehouse::native_conv_gradient_of_x", mutates_args=())
def _gradient_of_x(grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    grad_x = empty_output(x, x.shape[1], x.shape[2:])[0]
    pixels = _room_for_pixels(grad_x)
    _call("gradient_of_x", alpha, cells.transpose(0, 1), (_pixels(grad), pixels), _problem(alpha, x, grad, window))
    return _from_pixels(pixels, grad_x)


@_gradient_of_x.register_fake
def _(_grad: Tensor, _alpha: Tensor, _cells: Tensor, x: Tensor, _window: Sequence[int]) -> Tensor:
    return empty_output(x, x.shape[1], x.shape[2:])[0]


@torch.library.custom_op("kernelwarehouse::native_conv_gradients_of_mixing", mutates_args=())
def _gradients_of_mixing(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    # Every thread sums what it finds; the length of a row is rounded up to whole registers, of at most 16 values.
    grad_alpha = alpha.new_zeros(torch.get_num_threads(), *alpha.shape[:3], math.ceil(len(cells) / 16) * 16)
    grad_cells = _like_cells(cells)
    operands = _pixels(x), _pixels(grad), grad_alpha, grad_cells.transpose(0, 1)
    _call("gradients_of_mixing", alpha, cells.transpose(0, 1), operands, _problem(alpha, x, grad, window))
    return grad_alpha.sum(0)[..., : len(cells)].contiguous(), grad_cells


@_gradients_of_mixing.register_fake
def _(_grad: Tensor, alpha: Tensor, cells: Tensor, _x: Tensor, _window: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(alpha, memory_format=torch.contiguous_format), _like_cells(cells)


def _like_cells(cells: Tensor) -> Tensor:
    return cells.new_empty(cells.shape[1], len(cells), *cells.shape[2:]).transpose(0, 1)


def _pixels(images: Tensor) -> Tensor:
    """(B, C, *spatial) → (B, *spatial, C), contiguous: the same memory if channels are last in it."""
    view = images.movedim(1, -1)
    if view.is_contiguous() or not images.is_contiguous():
        return view.contiguous()
    return _reorder(images.flatten(2), _room_for_pixels(images))


def _room_for_pixels(images: Tensor) -> Tensor:
    """The view of images with channels last, or uninitialised memory of its shape."""
    view = images.movedim(1, -1)
    return view if view.is_contiguous() else torch.empty_like(view, memory_format=torch.contiguous_format)


def _from_pixels(pixels: Tensor, images: Tensor) -> Tensor:
    """Fill images, contiguous or with channels last, from `pixels`, which may be a view of them."""
    if pixels.data_ptr() == images.data_ptr():
        return images
    return _reorder(pixels.flatten(1, -2), images)


def _reorder(matrices: Tensor, out: Tensor) -> Tensor:
    """Write the transposes of (B, rows, columns) into the memory of out."""
    arguments = map(ctypes.c_int64, (torch.get_num_threads(), *matrices.shape))
    pointers = ctypes.c_void_p(matrices.data_ptr()), ctypes.c_void_p(out.data_ptr())
    getattr(library(), f"reorder_{_TYPES[out.dtype]}")(*arguments, *pointers)
    return out


def _problem(
    alpha: Tensor, x: Tensor, y: Tensor, window: Sequence[int], folded: bool = False
) -> ctypes.Array[ctypes.c_int64]:
    """Sizes as `Problem` in convolution.cpp has them; α (B, blocks of output channels, parts, n)."""
    _, alpha_blocks, parts, n = alpha.shape
    blocks_out, blocks_in = 1 if folded else alpha_blocks, parts // math.prod(window[:3])
    counts = len(x), blocks_out, blocks_in, n, y.shape[1] // blocks_out, x.shape[1] // blocks_in
    return _sizes(counts, tuple(x.shape[2:]), tuple(y.shape[2:]), tuple(window), alpha_blocks if folded else 0)


@functools.lru_cache(1024)
def _sizes(
    counts: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], window: tuple[int, ...], folded: int
) -> ctypes.Array[ctypes.c_int64]:
    if window == (1,) * 6 + (0,) * 3 + (1,) * 3:  # all pixels are alike
        inputs = outputs = (math.prod(outputs),)
    missing = (1,) * (3 - len(inputs))
    values = [*counts, *missing, *inputs, *missing, *outputs, *window, folded]
    return (ctypes.c_int64 * len(values))(*values)


def _call(function: str, alpha: Tensor, rows: Tensor, operands: Sequence[Tensor], problem: ctypes.Array) -> None:
    tensors = alpha.contiguous(), rows.contiguous(), *operands
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    run = getattr(library(), f"{function}_{_TYPES[alpha.dtype]}")
    run(problem, ctypes.c_int64(torch.get_num_threads()), *pointers)
