"""The convolution with mixed kernels in C++, for a CPU: kernels live in the cache, and inputs are read in place.

No kernel is written to memory: what a core mixes at once fits in its own cache, and in backward it is mixed again.
It computes in float32 and float64; in half precision, values are converted before and after.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu import call, from_pixels, operator, output_size, pixels, problem, room_for_pixels, window_of
from ..geometry import Geometry
from ..images import empty_images
from .mixing import at_every_position, by_output_blocks, by_positions, is_shared
from .partition import Partition


def forward(x: Tensor, alpha: Tensor, bank: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]); arguments as `mixture_conv`, all of x's type, which is float32 or float64.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    x, padding = geometry.split_padding(x)
    window = window_of(partition.kernel[2:], geometry, padding)
    if is_of_experts(partition) and tuple(bank.shape[1:]) == partition.kernel and bank.is_contiguous():
        return convolve_experts(alpha, bank, x, window)
    if is_shared(bank, partition):
        return convolve(by_output_blocks(alpha, partition), bank.transpose(0, 1), x, window, False)
    alpha, partition = at_every_position(alpha, partition)
    rows = bank.transpose(0, 1).movedim(2, -1).flatten(2)  # (Cout, n, taps · Cin)
    return convolve(by_output_blocks(alpha, partition), rows, x, window, True)


def gradients(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    alpha: Tensor,
    bank: Tensor,
    partition: Partition,
    geometry: Geometry,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, α and the bank, as needed; padding must be equal zeros (`Geometry.written_out`).

    The bank is shared by all parts, or of experts.
    """
    _, padding = geometry.split_padding(x)
    window = window_of(partition.kernel[2:], geometry, padding)
    if is_of_experts(partition) and tuple(bank.shape[1:]) == partition.kernel:
        bank = bank.contiguous()
        grad_x = gradient_of_x_of_experts(grad, alpha, bank, x, window) if needs[0] else None
        if not (needs[1] or needs[2]):
            return grad_x, None, None
        grad_alpha, grad_bank = gradients_of_experts(grad, alpha, bank, x, window)
        return grad_x, grad_alpha if needs[1] else None, grad_bank if needs[2] else None
    blocks = by_output_blocks(alpha, partition)
    grad_x = gradient_of_x(grad, blocks, bank, x, window) if needs[0] else None
    if not (needs[1] or needs[2]):
        return grad_x, None, None
    grad_blocks, grad_bank = gradients_of_mixing(grad, blocks, bank, x, window)
    return grad_x, by_positions(grad_blocks, partition) if needs[1] else None, grad_bank if needs[2] else None


def is_of_experts(partition: Partition) -> bool:
    """Whether a bank for each part is of whole kernels that have one coefficient, or one for each position."""
    return partition.cell[:2] == partition.kernel[:2] and (partition.cell == partition.kernel or partition.by_positions)


def _output(alpha: Tensor, rows: Tensor, x: Tensor, window: Sequence[int], own: bool) -> Tensor:
    size = output_size(x.shape[2:], window)
    return empty_images(x, rows.shape[0] * (1 if own else alpha.shape[1]), size)


def _mixing_macs(alpha: Sequence[int], rows: Sequence[int], own: bool = False) -> int:
    """Multiply-adds of making the kernels of all samples once."""
    samples, blocks, parts, _ = alpha
    return samples * math.prod(rows) * (1 if own else blocks * parts)


def _applying_macs(x: Sequence[int], y: Sequence[int], window: Sequence[int]) -> int:
    """Multiply-adds of a convolution, or of one of its gradients."""
    return math.prod(y) * x[1] * math.prod(window[:3])


def _forward_macs(alpha: Sequence[int], rows: Sequence[int], x: Sequence[int], window: Sequence[int], own: bool) -> int:
    channels = rows[0] * (1 if own else alpha[1])
    y = x[0], channels, *output_size(x[2:], window)
    return _mixing_macs(alpha, rows, own) + _applying_macs(x, y, window)


def _gradient_of_x_macs(
    grad: Sequence[int], alpha: Sequence[int], cells: Sequence[int], x: Sequence[int], window: Sequence[int]
) -> int:
    """The kernels are mixed again."""
    return _mixing_macs(alpha, cells) + _applying_macs(x, grad, window)


def _gradients_of_mixing_macs(
    grad: Sequence[int], alpha: Sequence[int], cells: Sequence[int], x: Sequence[int], window: Sequence[int]
) -> int:
    return 2 * _mixing_macs(alpha, cells) + _applying_macs(x, grad, window)


@operator("mixture_conv", fake=_output, macs=_forward_macs)
def convolve(alpha: Tensor, rows: Tensor, x: Tensor, window: Sequence[int], own: bool) -> Tensor:
    """Of α (B, blocks of output channels, parts, n) and a bank by output channel.

    The bank is (cout, n, cin, *ones), shared by all parts, or (Cout, n, parts · cin) if each part has its `own`. A part
    is a position of the kernel and a block of input channels.
    """
    y = _output(alpha, rows, x, window, own)
    values = room_for_pixels(y)
    call("convolve", [_problem(alpha, x, y, window, own)], (alpha.contiguous(), rows.contiguous(), pixels(x), values))
    return from_pixels(values, y)


def _like_x(_grad: Tensor, _alpha: Tensor, _cells: Tensor, x: Tensor, _window: Sequence[int]) -> Tensor:
    return empty_images(x, x.shape[1], x.shape[2:])


def _output_of_experts(_alpha: Tensor, bank: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    return empty_images(x, bank.shape[1], output_size(x.shape[2:], window))


def _experts_macs(alpha: Sequence[int], bank: Sequence[int], x: Sequence[int], window: Sequence[int]) -> int:
    y = x[0], bank[1], *output_size(x[2:], window)
    return alpha[0] * math.prod(bank) + _applying_macs(x, y, window)


@operator("mixture_conv_experts", fake=_output_of_experts, macs=_experts_macs)
def convolve_experts(alpha: Tensor, bank: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    """Of α (B, 1 or a part for each position, n) and n whole kernels (n, Cout, Cin, *k), contiguous."""
    y = _output_of_experts(alpha, bank, x, window)
    values = room_for_pixels(y)
    call("convolve", [_problem_of_experts(alpha, x, y, window)], (alpha.contiguous(), bank, pixels(x), values))
    return from_pixels(values, y)


def _gradient_of_x_of_experts_macs(
    grad: Sequence[int], alpha: Sequence[int], bank: Sequence[int], x: Sequence[int], window: Sequence[int]
) -> int:
    """The kernels are mixed again."""
    return alpha[0] * math.prod(bank) + _applying_macs(x, grad, window)


@operator("mixture_conv_gradient_of_x_of_experts", fake=_like_x, macs=_gradient_of_x_of_experts_macs)
def gradient_of_x_of_experts(grad: Tensor, alpha: Tensor, bank: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    """That of x, given that of the result of `convolve_experts`."""
    grad_x = _like_x(grad, alpha, bank, x, window)
    values = room_for_pixels(grad_x)
    sizes = _problem_of_experts(alpha, x, grad, window)
    call("gradient_of_x", [sizes], (alpha.contiguous(), bank, pixels(grad), values))
    return from_pixels(values, grad_x)


def _like_mixing_of_experts(
    _grad: Tensor, alpha: Tensor, bank: Tensor, _x: Tensor, _window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    alpha, bank = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (alpha, bank))
    return alpha, bank


def _gradients_of_experts_macs(
    grad: Sequence[int], alpha: Sequence[int], bank: Sequence[int], x: Sequence[int], window: Sequence[int]
) -> int:
    return 2 * alpha[0] * math.prod(bank) + _applying_macs(x, grad, window)


@operator("mixture_conv_gradients_of_experts", fake=_like_mixing_of_experts, macs=_gradients_of_experts_macs)
def gradients_of_experts(
    grad: Tensor, alpha: Tensor, bank: Tensor, x: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Those of α and of the experts, given that of the result of `convolve_experts`."""
    _, grad_bank = _like_mixing_of_experts(grad, alpha, bank, x, window)
    grad_alpha = _room_for_alpha(alpha)
    operands = alpha.contiguous(), bank, pixels(x), pixels(grad)
    call("gradients_of_mixing", [_problem_of_experts(alpha, x, grad, window)], (*operands, grad_alpha, grad_bank))
    return grad_alpha.sum(0)[..., : alpha.shape[-1]].contiguous(), grad_bank


def _room_for_alpha(alpha: Tensor) -> Tensor:
    """Zeros for the gradient of α, (threads, *, n): every thread sums what it finds.

    n is rounded up to whole registers, of at most 16 values.
    """
    return alpha.new_zeros(torch.get_num_threads(), *alpha.shape[:-1], math.ceil(alpha.shape[-1] / 16) * 16)


def _problem_of_experts(alpha: Tensor, x: Tensor, y: Tensor, window: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    batch, parts, n = alpha.shape
    return problem((batch, 1, 1, n, y.shape[1], x.shape[1]), x.shape[2:], y.shape[2:], window, 1, parts)


@operator("mixture_conv_gradient_of_x", fake=_like_x, macs=_gradient_of_x_macs)
def gradient_of_x(grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]) -> Tensor:
    """That of x, given that of y, for a shared bank (n, cout, cin, *ones)."""
    grad_x = _like_x(grad, alpha, cells, x, window)
    values = room_for_pixels(grad_x)
    operands = alpha.contiguous(), cells.transpose(0, 1).contiguous(), pixels(grad), values
    call("gradient_of_x", [_problem(alpha, x, grad, window)], operands)
    return from_pixels(values, grad_x)


def _like_mixing(
    _grad: Tensor, alpha: Tensor, cells: Tensor, _x: Tensor, _window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    n, cout, *rest = cells.shape
    grad_cells = cells.new_empty(cout, n, *rest).transpose(0, 1)
    return torch.empty_like(alpha, memory_format=torch.contiguous_format), grad_cells


@operator("mixture_conv_gradients_of_mixing", fake=_like_mixing, macs=_gradients_of_mixing_macs)
def gradients_of_mixing(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Those of α and of a shared bank (n, cout, cin, *ones), given that of y."""
    _, grad_cells = _like_mixing(grad, alpha, cells, x, window)
    grad_alpha = _room_for_alpha(alpha)
    operands = alpha.contiguous(), cells.transpose(0, 1).contiguous(), pixels(x), pixels(grad)
    results = grad_alpha, grad_cells.transpose(0, 1)
    call("gradients_of_mixing", [_problem(alpha, x, grad, window)], operands + results)
    return grad_alpha.sum(0)[..., : len(cells)].contiguous(), grad_cells


def _problem(
    alpha: Tensor, x: Tensor, y: Tensor, window: Sequence[int], own: bool = False
) -> ctypes.Array[ctypes.c_int64]:
    _, alpha_blocks, parts, n = alpha.shape
    blocks_out, blocks_in = 1 if own else alpha_blocks, parts // math.prod(window[:3])
    counts = x.shape[0], blocks_out, blocks_in, n, y.shape[1] // blocks_out, x.shape[1] // blocks_in
    return problem(counts, x.shape[2:], y.shape[2:], window, alpha_blocks if own else 0)
