"""Per-sample convolution without a loop over samples, in three forms.

``grouped`` is one convolution with a group for every sample. ``unfold`` copies out the window of every output position
(im2col) and is one batched matrix product; ``taps`` is one product for each position of the kernel and copies nothing.
The last two are the same for 1×1 kernels, where they are the better form, and can be exported: their graphs hold no
number of groups that depends on the batch.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry
from .im2col import taps, windows
from .reference import CONV, CONV_GRADIENTS


def grouped_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) with the batch folded into the groups; shapes as `per_sample_conv`."""
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


def grouped_gradients(
    grad: Tensor, needs: Sequence[bool], x: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and the kernels, as needed, given that of y; padding must be equal zeros."""
    batch, out_channels = weight.shape[:2]
    x, padding = geometry.split_padding(x)
    shape = (1, batch * x.shape[1], *x.shape[2:])
    kernels = weight.reshape(batch * out_channels, *weight.shape[2:])
    grads = grad.reshape(1, batch * out_channels, *grad.shape[2:])
    of_input, of_kernels = CONV_GRADIENTS[len(geometry.stride)]
    rest = geometry.stride, padding, geometry.dilation, batch * geometry.groups
    grad_x = of_input(shape, kernels, grads, *rest).reshape(x.shape) if needs[0] else None
    if not needs[1]:
        return grad_x, None
    return grad_x, of_kernels(x.reshape(shape), kernels.shape, grads, *rest).reshape(weight.shape)


def taps_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b] = Σ over kernel positions p of W[b, :, :, p] @ (x[b] shifted by p); shapes as `per_sample_conv`."""
    batch, out_channels, group_channels, *kernel_size = weight.shape
    groups = geometry.groups
    size = geometry.output_size(x.shape[2:], kernel_size)
    x = geometry.pad(x)
    kernels = weight.reshape(batch, groups, out_channels // groups, group_channels, -1)
    terms = []
    for tap, window in enumerate(taps(kernel_size, size, geometry)):
        shifted = x[(slice(None), slice(None), *window)].reshape(batch, groups, group_channels, -1)
        kernel = kernels[..., tap]
        terms.append(kernel * shifted if group_channels == 1 else torch.matmul(kernel, shifted))
    return functools.reduce(torch.add, terms).reshape(batch, out_channels, *size)


def unfold_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b] = W[b] as a matrix @ the windows of x[b] as columns; shapes as `per_sample_conv`."""
    batch, out_channels, _, *kernel_size = weight.shape
    dims, groups = len(kernel_size), geometry.groups
    size = geometry.output_size(x.shape[2:], kernel_size)
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    columns = windows(x, kernel_size, geometry).permute(order).reshape(batch, groups, -1, math.prod(size))
    y = torch.matmul(weight.reshape(batch, groups, out_channels // groups, -1), columns)
    return y.reshape(batch, out_channels, *size)
