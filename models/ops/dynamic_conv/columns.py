"""What a convolution reads, as the rows of a matrix: im2col and its adjoint, in any number of dimensions."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry


def windows(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """What each output position sees of x (B, C, *spatial): a view (B, C, *output spatial, *kernel)."""
    x = geometry.pad(x)
    for d, (k, s, step) in enumerate(zip(kernel_size, geometry.stride, geometry.dilation, strict=True)):
        x = x.unfold(2 + d, step * (k - 1) + 1, s)[..., ::step]
    return x


def columns(x: Tensor, kernel_size: Sequence[int], geometry: Geometry, taps_each: int | None = None) -> list[Tensor]:
    """Lay out what each output position reads, a few taps at a time.

    Args:
        x: (B, C, *spatial).
        kernel_size: One entry per spatial dimension.
        geometry: The convolution's arguments.
        taps_each: Most taps of a matrix; by default one matrix holds them all.

    Returns:
        Matrices (B, P, taps · C), ordered (tap, channel). A kernel of one tap and stride 1 reads x as it is: a view.
    """
    size = geometry.output_size(x.shape[2:], kernel_size)
    x = geometry.pad(x).movedim(1, -1)
    if math.prod(kernel_size) == 1:
        (window,) = taps(kernel_size, size, geometry)
        return [x[(slice(None), *window)].flatten(1, -2)]
    x = x.contiguous()  # rows of channels are copied far faster than single values
    views = [x[(slice(None), *window)] for window in taps(kernel_size, size, geometry)]
    ends = itertools.accumulate(parts := parts_of(len(views), taps_each or len(views)))
    return [torch.cat(views[end - part : end], -1).flatten(1, -2) for end, part in zip(ends, parts, strict=True)]


def columns_adjoint(
    grads: Sequence[Tensor], size: Sequence[int], kernel_size: Sequence[int], geometry: Geometry
) -> Tensor:
    """Add up what the rows of `columns` have received: (B, C, *spatial), in channels-last order.

    Args:
        grads: Gradients of the matrices, (B, P, taps · C).
        size: Spatial size of the input.
        kernel_size: As `columns`.
        geometry: As `columns`; only zeros are padded.
    """
    positions = geometry.output_size(size, kernel_size)
    if math.prod(kernel_size) == 1 and tuple(positions) == tuple(size):
        return grads[0].unflatten(1, positions).movedim(-1, 1)
    padded = [n + a + b for n, (a, b) in zip(size, geometry.padding, strict=True)]
    channels = sum(grad.shape[2] for grad in grads) // math.prod(kernel_size)
    total = grads[0].new_zeros(len(grads[0]), *padded, channels)
    pieces = [piece for grad in grads for piece in grad.unflatten(1, positions).split(channels, -1)]
    for piece, window in zip(pieces, taps(kernel_size, positions, geometry), strict=True):
        total[(slice(None), *window)] += piece
    return F.pad(total, [0, 0, *(-p for pair in reversed(geometry.padding) for p in pair)]).movedim(-1, 1)


def taps(kernel_size: Sequence[int], positions: Sequence[int], geometry: Geometry) -> Iterator[tuple[slice, ...]]:
    """For each position of the kernel, the part of the padded input that the outputs read there."""
    for tap in itertools.product(*(range(k) for k in kernel_size)):
        yield tuple(
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, geometry.dilation, geometry.stride, positions, strict=True)
        )


def parts_of(total: int, most: int) -> list[int]:
    """Cut `total` into parts of at most `most`, as equal as can be."""
    each = even_part(total, most)
    return [min(each, total - first) for first in range(0, total, each)]


def even_part(total: int, most: int, multiple: int = 1) -> int:
    """Size of parts of at most `most`, as equal as can be, that make up `total`; rounded up to a multiple."""
    part = math.ceil(total / math.ceil(total / max(most, 1)))
    return min(math.ceil(part / multiple) * multiple, total)
