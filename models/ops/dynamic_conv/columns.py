"""What a convolution reads, as the rows of a matrix: im2col and its adjoint, in any number of dimensions."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry


def windows(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """What each output position sees of x (B, C, *spatial): a view (B, C, *output spatial, *kernel)."""
    x = geometry.pad(x)
    for d, (k, s, step) in enumerate(zip(kernel_size, geometry.stride, geometry.dilation, strict=True)):
        x = x.unfold(2 + d, step * (k - 1) + 1, s)[..., ::step]
    return x


def columns(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """Lay out what each output position reads: (B, C, *spatial) → (B, P, taps · C), ordered (tap, channel).

    A kernel of one tap and stride 1 reads x as it is, and the result is a view.
    """
    if math.prod(kernel_size) > 1 and x.stride(1) != 1:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # rows of channels are copied far faster than single values
    dims = len(kernel_size)
    seen = windows(x, kernel_size, geometry)
    rows = seen.permute(0, *range(2, 2 + 2 * dims), 1)
    return rows.flatten(1 + dims).flatten(1, dims)


def columns_adjoint(grad: Tensor, size: Sequence[int], kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """Add up what the rows of `columns` have received: (B, P, taps · C) → (B, C, *spatial), in channels-last order.

    Args:
        grad: Gradient of the columns.
        size: Spatial size of the input.
        kernel_size: As `columns`.
        geometry: As `columns`; only zeros are padded.
    """
    positions = geometry.output_size(size, kernel_size)
    pieces = grad.reshape(grad.shape[0], *positions, math.prod(kernel_size), -1)
    if math.prod(kernel_size) == 1 and tuple(positions) == tuple(size):
        return pieces.squeeze(-2).movedim(-1, 1)
    padded = [n + a + b for n, (a, b) in zip(size, geometry.padding, strict=True)]
    total = grad.new_zeros(grad.shape[0], *padded, pieces.shape[-1])
    for index, window in enumerate(taps(kernel_size, positions, geometry)):
        total[(slice(None), *window)] += pieces[..., index, :]
    return F.pad(total, [0, 0, *(-p for pair in reversed(geometry.padding) for p in pair)]).movedim(-1, 1)


def taps(kernel_size: Sequence[int], positions: Sequence[int], geometry: Geometry) -> Iterator[tuple[slice, ...]]:
    """For each position of the kernel, the part of the padded input that the outputs read there."""
    for tap in itertools.product(*(range(k) for k in kernel_size)):
        yield tuple(
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, geometry.dilation, geometry.stride, positions, strict=True)
        )
