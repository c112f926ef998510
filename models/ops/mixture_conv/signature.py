"""What decides how a convolution with mixed kernels is computed."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..context import computing_type, exporting
from ..geometry import Geometry
from .partition import Partition


class Signature(NamedTuple):
    """One case of `mixture_conv`, or of a layer that is made of it.

    Attributes:
        operation: Whose candidates are chosen from.
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
        shared: Whether all parts share the bank.
        terms: n, the terms of each mixture.
        hidden: r, the width of the hidden vector that α is linear in but for a factor; 0 where it is not, or unknown.
        images: Shape of the input, (B, Cin, *spatial); empty for export.
        channels_last: Whether channels lie together in memory.
        dtype: The type of products.
        device: Type of the device.
        gradients: Whether they are recorded.
        of_images: Whether the input requires one.
        exporting: Whether a graph is made that will run elsewhere.
    """

    operation: str
    partition: Partition
    geometry: Geometry
    shared: bool
    terms: int
    hidden: int
    images: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    device: str
    gradients: bool
    of_images: bool
    exporting: bool

    @property
    def positions(self) -> int:
        """P, the output positions of one sample."""
        p = 1
        for size in self.geometry.output_size(self.images[2:], self.partition.kernel[2:]):
            p *= size
        return p


def signature_of(
    x: Tensor, terms: int, shared: bool, partition: Partition, geometry: Geometry, operation: str, hidden: int = 0
) -> Signature:
    """The case of images x (B, Cin, *spatial), here and now."""
    export = exporting()
    return Signature(
        operation,
        partition,
        geometry,
        shared,
        terms,
        hidden,
        () if export else tuple(x.shape),
        x.stride(1) == 1,
        computing_type(x),
        x.device.type,
        torch.is_grad_enabled(),
        x.requires_grad,
        export,
    )
