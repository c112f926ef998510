"""Mixed kernels and an implicit matrix product: on a GPU the convolution reads the input in place, by Triton kernels.

Streaming copies what every tap reads into columns, k² times the input, and makes two launches for every tile. Here one
launch convolves the kernels of many samples, which were mixed by batched products; the backward pass mixes them again.
With `fused_chain` kernels come first (see `chained`): each mixture then has terms of its own in place of shared cells.

The operators are opaque to torch.compile, which therefore sees one graph whatever the number of chunks. The first call
for a size times several tiles (Triton's tuner), so that a CUDA graph can be captured only after it.
"""

import functools
import os
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..geometry import Geometry
from .fused_operators import convolve, gradient_of_x, gradients_of_kernels
from .mixing import by_output_blocks
from .partition import Partition
from .streamed import streamed_conv


def fused_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]); arguments, result and order of the gradient as `streamed_conv`.

    Streaming takes over in 3-D, and where the kernels cannot run, which is said once.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    if not fuses(x, geometry):
        return streamed_conv(alpha, cells, x, partition, geometry)
    return _of_images(_FusedConv, x, partition, geometry, by_output_blocks(alpha, partition), cells)


def fused_chain(
    alpha: Tensor, weights: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry
) -> Tensor:
    """The same with W_i = Σ_k α_ik Σ_j F_ikj e_j, kernels first, where it `fuses`.

    Args:
        alpha: (B, blocks of output channels, parts, r).
        weights: F, (blocks, r, parts, n).
        cells: (n, cout, cin, *ones).
        x: (B, Cin, *spatial), of one or two dimensions.
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
    """
    return _of_images(_FusedChain, x, partition, geometry, alpha, weights, cells)


def fuses(x: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels can convolve x (B, Cin, *spatial); if not, for want of something, a warning says so, once."""
    return len(geometry.stride) <= 2 and can_run(x.device.type, x.dtype, warn=True)


def _of_images(function: type, x: Tensor, partition: Partition, geometry: Geometry, *factors: Tensor) -> Tensor:
    x, padding = geometry.split_padding(x)
    taps = partition.kernel[2:]
    if x.ndim == 4:
        return function.apply(x, (*taps, *geometry.stride, *padding, *geometry.dilation), *factors)
    window = (1, *taps, 1, *geometry.stride, 0, *padding, 1, *geometry.dilation)
    return function.apply(x.unsqueeze(2), window, *factors).squeeze(2)  # a line is an image of one row


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


class _FusedConv(torch.autograd.Function):
    """`fused_conv` of images and of α (B, blocks of output channels, taps · blocks of input channels, n)."""

    @staticmethod
    def forward(ctx, x: Tensor, window: tuple[int, ...], alpha: Tensor, cells: Tensor):
        ctx.save_for_backward(x, alpha, cells)
        ctx.window = window
        return convolve(alpha, cells, x, window, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, alpha, cells = ctx.saved_tensors
        needs_x, _, needs_alpha, needs_cells = ctx.needs_input_grad
        grad_alpha = grad_cells = grad_x = None
        if needs_x:
            grad_x = gradient_of_x(grad, alpha, cells, x, ctx.window, False)
        if needs_alpha or needs_cells:
            grad_alpha, grad_cells = gradients_of_kernels(grad, alpha, cells, x, ctx.window, False)
        return grad_x, None, grad_alpha if needs_alpha else None, grad_cells if needs_cells else None


class _FusedChain(torch.autograd.Function):
    """`fused_chain`: the terms, (blocks, parts, r, cout, cin), are made again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, window: tuple[int, ...], alpha: Tensor, weights: Tensor, cells: Tensor):
        ctx.save_for_backward(x, alpha, weights, cells)
        ctx.window = window
        return convolve(alpha, _terms(weights, cells), x, window, True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, alpha, weights, cells = ctx.saved_tensors
        needs_x, _, needs_alpha, needs_weights, needs_cells = ctx.needs_input_grad
        terms = _terms(weights, cells)
        grad_x = grad_alpha = grad_weights = grad_cells = None
        if needs_x:
            grad_x = gradient_of_x(grad, alpha, terms, x, ctx.window, True)
        if needs_alpha or needs_weights or needs_cells:
            grad_alpha, grad_terms = gradients_of_kernels(grad, alpha, terms, x, ctx.window, True)
            rows = grad_terms.flatten(3).flatten(0, 2).to(weights.dtype)
        if needs_weights:
            each = torch.mm(rows, cells.flatten(1).to(rows.dtype).mT)
            grad_weights = each.view(weights.transpose(1, 2).shape).transpose(1, 2)
        if needs_cells:
            grad_cells = torch.mm(weights.transpose(1, 2).flatten(0, 2).mT, rows).to(cells.dtype).view(cells.shape)
        return grad_x, None, grad_alpha if needs_alpha else None, grad_weights, grad_cells


def _terms(weights: Tensor, cells: Tensor) -> Tensor:
    """(blocks, r, parts, n), (n, cout, cin, *ones) → (blocks, parts, r, cout, cin), by one large product."""
    rows = torch.matmul(weights.transpose(1, 2), cells.flatten(1).to(weights.dtype))
    return rows.unflatten(3, cells.shape[1:3])
