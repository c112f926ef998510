"""The fused convolution and its gradients as operators, which torch.compile does not look into.

Kernels of as many samples as `_CHUNK_BYTES` hold are mixed by batched products, and one launch convolves them. They are
mixed of `cells` (n, cout, cin, *ones) that all mixtures share, or, if each mixture has its `own`, of terms (blocks of
output channels, parts, r, cout, cin). α is (B, blocks, parts, n or r), the window the fields of `Window`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dynamic_conv import even_part
from ..images import empty_images
from .mixing import mix_rows

_CHUNK_BYTES = 256 << 20  # of the kernels that exist at once: samples enough to fill a GPU with tiles of small maps


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


@torch.library.custom_op("kernelwarehouse::fused_conv", mutates_args=())
def convolve(alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int], own: bool) -> Tensor:
    """y (B, Cout, height, width) of images x (B, Cin, height, width)."""
    from . import fused_kernels

    rows, _ = _cell(cells, own)
    y = empty_images(x, alpha.shape[1] * rows, Window(*window).positions(*x.shape[2:]))
    flat = y.flatten(2)
    channels, positions = flat.shape[1:]
    with torch.cuda.device_of(x):
        for samples in _chunks(alpha, cells, own):
            kernels = _mix(alpha[samples], cells, own)
            fused_kernels.convolve[_grid(len(x[samples]), {"block_o": channels, "block_p": positions})](
                x[samples],
                kernels,
                flat[samples],
                *x.shape[2:],
                y.shape[3],
                positions,
                x.shape[1],
                channels,
                rows,
                *x.stride(),
                *kernels.stride()[:3],
                *flat.stride(),
                **_constants(window, samples, positions),
            )
    return y


@convolve.register_fake
def _(alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int], own: bool) -> Tensor:
    return empty_images(x, alpha.shape[1] * _cell(cells, own)[0], Window(*window).positions(*x.shape[2:]))


@torch.library.custom_op("kernelwarehouse::fused_conv_gradient_of_x", mutates_args=())
def gradient_of_x(grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int], own: bool) -> Tensor:
    """The gradient of x, given that of y."""
    from . import fused_kernels

    grad_x = torch.empty_like(x)
    w = Window(*window)
    channels, height, width = x.shape[1:]
    pixels = math.ceil(height / w.stride_h) * math.ceil(width / w.stride_w)
    with torch.cuda.device_of(x):
        for samples in _chunks(alpha, cells, own):
            kernels = _mix(alpha[samples], cells, own)
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
                _cell(cells, own)[0],
                *grad.stride(),
                *kernels.stride()[:3],
                *grad_x.stride(),
                **_constants(window, samples, pixels),
            )
    return grad_x


@gradient_of_x.register_fake
def _(_grad: Tensor, _alpha: Tensor, _cells: Tensor, x: Tensor, _window: Sequence[int], _own: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kernelwarehouse::fused_conv_gradients_of_kernels", mutates_args=())
def gradients_of_kernels(
    grad: Tensor, alpha: Tensor, cells: Tensor, x: Tensor, window: Sequence[int], own: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of α and of the cells or terms, given that of y."""
    from . import fused_kernels

    grad_alpha = torch.empty_like(alpha, memory_format=torch.contiguous_format)
    grad_cells = _like_cells(cells).zero_()
    rows, width = _cell(cells, own)
    channels, positions = grad.shape[1], grad.shape[2:].numel()
    w = Window(*window)
    blocks = {"block_o": channels, "block_c": x.shape[1]}
    mixed = cells if own else cells.flatten(1).to(alpha.dtype)
    with torch.cuda.device_of(x):
        for samples in _chunks(alpha, cells, own):
            mixtures = alpha.new_empty(*alpha[samples].shape[:3], rows * width)
            fused_kernels.correlate[_grid(w.taps_h * w.taps_w * len(x[samples]), blocks)](
                x[samples],
                grad[samples],
                mixtures,
                *x.shape[2:],
                grad.shape[3],
                positions,
                x.shape[1],
                channels,
                width,
                rows,
                *x.stride(),
                *grad.stride(),
                **_constants(window, samples, positions),
            )
            _unmix(mixtures, alpha[samples], mixed, own, grad_alpha[samples], grad_cells)
    return grad_alpha, grad_cells


@gradients_of_kernels.register_fake
def _(
    _grad: Tensor, alpha: Tensor, cells: Tensor, _x: Tensor, _window: Sequence[int], _own: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(alpha, memory_format=torch.contiguous_format), _like_cells(cells)


def _like_cells(cells: Tensor) -> Tensor:
    return torch.empty_like(cells, dtype=torch.promote_types(cells.dtype, torch.float32))


def _cell(cells: Tensor, own: bool) -> tuple[int, int]:
    """Output and input channels of a cell, or of a term."""
    return tuple(cells.shape[3:] if own else cells.shape[1:3])


def _mix(alpha: Tensor, cells: Tensor, own: bool) -> Tensor:
    """Kernels (cout, B, blocks, parts · cin) of α (B, blocks, parts, n)."""
    if not own:
        return mix_rows(alpha.flatten(0, 2), cells).view(cells.shape[1], *alpha.shape[:2], -1)
    rows, width = _cell(cells, own)
    kernels = alpha.new_empty(rows, *alpha.shape[:3], width)
    for block, part in itertools.product(*map(range, alpha.shape[1:3])):
        coefficients = alpha[:, block, part].expand(rows, -1, -1)
        torch.bmm(coefficients, cells[block, part].transpose(0, 1), out=kernels[:, :, block, part])
    return kernels.flatten(3)


def _unmix(mixtures: Tensor, alpha: Tensor, cells: Tensor, own: bool, grad_alpha: Tensor, grad_cells: Tensor) -> None:
    """From gradients of kernels, (B, blocks, parts, cout · cin), write those of α, and add those of the cells."""
    if not own:
        rows = mixtures.flatten(0, 2)
        grad_alpha.copy_(torch.mm(rows, cells.mT).view_as(alpha))
        grad_cells += torch.mm(alpha.flatten(0, 2).mT, rows).view_as(grad_cells)
        return
    for block, part in itertools.product(*map(range, alpha.shape[1:3])):
        received, terms = mixtures[:, block, part], cells[block, part].flatten(1)
        grad_alpha[:, block, part] = torch.mm(received, terms.mT)
        grad_cells[block, part] += torch.mm(alpha[:, block, part].mT, received).view(cells.shape[2:])


def _chunks(alpha: Tensor, cells: Tensor, own: bool) -> Iterator[slice]:
    """Slices of samples, as equal as can be, whose kernels take at most `_CHUNK_BYTES`."""
    kernel = math.prod(alpha.shape[1:3]) * math.prod(_cell(cells, own)) * alpha.element_size()
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
        **Window(*window)._asdict(),
        "precision": precision(),
        "size_class": 64 * positions.bit_length() + (samples.stop - samples.start).bit_length(),
    }
