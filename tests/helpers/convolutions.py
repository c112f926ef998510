"""Convolutions with mixed kernels of odd sizes, for the implementations that have kernels of their own."""

import torch
from torch import Tensor

from kernelwarehouse.models.ops.geometry import Geometry
from kernelwarehouse.models.ops.mixture_conv import Partition

# kernel, cell, size of the input, and the convolution's arguments; Triton's tiles are 16 × 32 × 8 in the interpreter
CONVOLUTIONS = {
    "padding": ((12, 6, 3, 3), (6, 3, 1, 1), (7, 5), {"padding": 1}),
    "stride": ((4, 6, 3, 3), (2, 6, 1, 1), (7, 5), {"stride": 2}),
    "one-pixel": ((4, 6, 3, 3), (4, 3, 1, 1), (1, 1), {"padding": 1}),
    "unequal": ((6, 4, 3, 3), (3, 2, 1, 1), (7, 5), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "stride-and-dilation": ((4, 3, 3, 2), (2, 3, 1, 1), (9, 7), {"stride": (2, 3), "padding": 3, "dilation": (2, 1)}),
    "unread-pixels": ((3, 2, 2, 1), (3, 1, 1, 1), (9, 7), {"stride": 4}),
    "unequal-padding": ((3, 2, 2, 2), (3, 2, 1, 1), (4, 5), {"padding": "same"}),
    "reflect": ((4, 3, 3, 3), (2, 3, 1, 1), (5, 4), {"padding": 1, "padding_mode": "reflect"}),
    "pointwise": ((8, 6, 1, 1), (4, 3, 1, 1), (7, 5), {}),
    "pointwise-stride": ((6, 4, 1, 1), (3, 4, 1, 1), (7, 5), {"stride": 2}),
    "several-tiles": ((34, 18, 1, 2), (17, 9, 1, 1), (7, 6), {"padding": (0, 1)}),
    "one-channel": ((1, 1, 3, 3), (1, 1, 1, 1), (4, 5), {"padding": 1}),
    "line": ((6, 4, 5), (3, 2, 1), (9,), {"stride": 2, "padding": 2, "dilation": 2}),
}


def convolution(
    name: str, device: str = "cpu", batch: int = 2, cells: int = 5
) -> tuple[Partition, Geometry, list[Tensor]]:
    """Partition, geometry, and α (B, m, n), cells and input as leaves in double precision."""
    torch.manual_seed(0)
    kernel, cell, size, arguments = CONVOLUTIONS[name]
    partition, geometry = Partition(kernel, cell), Geometry.of(kernel[2:], **arguments)
    shapes = (batch, partition.mixtures, cells), (cells, *cell), (batch, kernel[1], *size)
    return partition, geometry, [torch.randn(s, dtype=torch.float64, device=device).requires_grad_() for s in shapes]


# Depthwise convolutions: kernel, size of the input, and the convolution's arguments
DEPTHWISE = {
    "padding": ((3, 3), (7, 5), {"padding": 1}),
    "kernel-as-large-as-the-image": ((7, 7), (7, 7), {"padding": 3}),
    "kernel-larger-than-the-image": ((7, 7), (2, 3), {"padding": 3}),
    "one-pixel": ((3, 3), (1, 1), {"padding": 1}),
    "stride": ((3, 3), (9, 8), {"stride": 2, "padding": 1}),
    "unread-pixels": ((2, 1), (9, 7), {"stride": 4}),
    "unequal": ((3, 2), (13, 9), {"stride": (2, 3), "padding": (4, 0), "dilation": (3, 1)}),
    "unequal-padding": ((2, 4), (4, 5), {"padding": "same"}),
    "circular": ((3, 3), (5, 4), {"padding": 1, "padding_mode": "circular"}),
    "wide": ((1, 9), (2, 31), {"padding": (0, 4), "dilation": (1, 2)}),
    "pointwise": ((1, 1), (4, 5), {"stride": 2}),
    "line": ((5,), (16,), {"stride": 3, "padding": 4}),
    "volume": ((3, 2, 3), (4, 5, 6), {"stride": (1, 2, 1), "padding": (1, 0, 2), "dilation": (2, 1, 1)}),
}


def depthwise_leaves(case, channels, batch=2, dtype=torch.float64):
    kernel, size, arguments = DEPTHWISE[case]
    torch.manual_seed(0)
    x = torch.randn(batch, channels, *size, dtype=dtype).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    weight = torch.randn(batch, channels, 1, *kernel, dtype=dtype, requires_grad=True)
    return {"x": x, "weight": weight}, {**arguments, "groups": channels}
