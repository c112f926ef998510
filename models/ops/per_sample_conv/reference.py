"""The definition: one ordinary convolution per sample."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from ..geometry import Geometry

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Of the input and of the kernels.
CONV_GRADIENTS: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (grad.conv1d_input, grad.conv1d_weight),
    2: (grad.conv2d_input, grad.conv2d_weight),
    3: (grad.conv3d_input, grad.conv3d_weight),
}


def reference(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y[b] = conv(x[b], W[b]) by a loop over samples; shapes as `per_sample_conv`."""
    conv = CONV[len(geometry.stride)]
    outputs = [
        conv(sample, kernel, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups)
        for sample, kernel in zip(geometry.pad(x).split(1), weight, strict=True)
    ]
    return torch.cat(outputs)
