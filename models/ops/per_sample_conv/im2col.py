"""What the output positions of a convolution read, in any number of dimensions."""

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from ..geometry import Geometry


def windows(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """The window of each output position of x (B, C, *spatial): a view (B, C, *output spatial, *kernel)."""
    x = geometry.pad(x)
    for d, (k, s, step) in enumerate(zip(kernel_size, geometry.stride, geometry.dilation, strict=True)):
        x = x.unfold(2 + d, step * (k - 1) + 1, s)[..., ::step]
    return x


def taps(kernel_size: Sequence[int], positions: Sequence[int], geometry: Geometry) -> Iterator[tuple[slice, ...]]:
    """For each position of the kernel, the part of the padded input that the outputs read there."""
    for tap in itertools.product(*(range(k) for k in kernel_size)):
        yield tuple(
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, geometry.dilation, geometry.stride, positions, strict=True)
        )
