"""Per-sample convolution without a loop over samples, in two forms.

``grouped`` is one convolution with a group for every sample. ``taps`` is a batched matrix product for each position
of the kernel: the better form for 1×1 kernels, and the one that can be exported, because its graph holds no number
of groups that depends on the batch.
"""

import itertools

import torch
from torch import Tensor

from .geometry import Geometry
from .naive import CONV


def grouped_dynamic_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) with the batch folded into the groups; shapes as `dynamic_conv`."""
    batch, out_channels = weight.shape[:2]
    x, padding = geometry.split_padding(x)
    y = CONV[len(geometry.stride)](
        x.reshape(1, -1, *x.shape[2:]),
        weight.reshape(batch * out_channels, *weight.shape[2:]),
        stride=geometry.stride,
        padding=padding,
        dilation=geometry.dilation,
        groups=batch * geometry.groups,
    )
    return y.reshape(batch, out_channels, *y.shape[2:])


def taps_dynamic_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b] = Σ over kernel positions p of W[b, :, :, p] @ (x[b] shifted by p); shapes as `dynamic_conv`."""
    batch, out_channels, group_channels, *kernel_size = weight.shape
    groups = geometry.groups
    size = geometry.output_size(x.shape[2:], kernel_size)
    x = geometry.pad(x)
    kernels = weight.reshape(batch, groups, out_channels // groups, group_channels, *kernel_size)
    y = None
    for tap in itertools.product(*(range(k) for k in kernel_size)):
        window = tuple(
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, geometry.dilation, geometry.stride, size, strict=True)
        )
        shifted = x[(slice(None), slice(None), *window)].reshape(batch, groups, group_channels, -1)
        kernel = kernels[(..., *tap)]
        term = kernel * shifted if group_channels == 1 else torch.matmul(kernel, shifted)
        y = term if y is None else y + term
    return y.reshape(batch, out_channels, *size)
