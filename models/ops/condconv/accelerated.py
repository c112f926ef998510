"""timm's CondConv2d, computed by `mixture_conv`."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..api import DynamicLayer
from ..geometry import Geometry
from ..mixture_conv import IMPLEMENTATIONS, MixtureConv, Partition, Signature, mixture_conv, signature_of
from ..mixture_conv.mixing import is_shared


class AcceleratedCondConv2d(DynamicLayer):
    """y[b] = conv(x[b], Σ_e r[b, e] W_e) + Σ_e r[b, e] b_e, for a routing r that it is given.

    It has the parameters of the layer of timm's that it is made of, and their names and shapes.

    Attributes:
        weight: The experts, (E, Cout · Cin/groups · k · k).
        bias: Theirs, (E, Cout), or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: Any):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        kernel = tuple(layer.weight_shape)
        self.partition = Partition(kernel, kernel)
        self.geometry = Geometry.of(kernel[2:], layer.stride, layer.padding, layer.dilation, layer.groups)
        self.pads_same = layer.dynamic_padding

    @property
    def experts(self) -> Tensor:
        """The experts as kernels (E, Cout, Cin/groups, k, k), a view."""
        return self.weight.view(-1, *self.partition.kernel)

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        """Images (B, Cin, H, W) and r (B, E) → (B, Cout, H', W')."""
        bias = None if self.bias is None else torch.matmul(routing_weights, self.bias)
        return mixture_conv(
            self.as_images(x),
            routing_weights[:, None],
            self.experts,
            self.partition,
            self.geometry,
            bias,
            implementation=self.implementation,
        )

    def as_images(self, x: Tensor) -> Tensor:
        """As `DynamicLayer`: padded by as much as TensorFlow's "same" needs for this size, where that depends on it."""
        if not self.pads_same:
            return x
        kernel, stride, dilation = self.partition.kernel[2:], self.geometry.stride, self.geometry.dilation
        return pad_same(x, list(kernel), list(stride), list(dilation))

    def candidates(self) -> Mapping[str, MixtureConv]:
        """As `DynamicLayer`."""
        return IMPLEMENTATIONS

    def signature(self, x: Tensor) -> Signature:
        """As `DynamicLayer`."""
        shared = is_shared(self.experts, self.partition)
        return signature_of(self.as_images(x), len(self.weight), shared, self.partition, self.geometry, "mixture_conv")

    def unsupported(self, implementation: str) -> str | None:
        """As `DynamicLayer`, for images of the parameters' type."""
        kernel = self.partition.kernel
        example = self.weight.new_empty(1, kernel[1] * self.geometry.groups, *kernel[2:])
        return IMPLEMENTATIONS[implementation].supports(self.signature(example))

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"experts={len(self.weight)}, kernel={self.partition.kernel}, bias={self.bias is not None}"


def accelerated(module: nn.Module) -> AcceleratedCondConv2d | None:
    """The layer for one of timm's; None for any other module, subclasses of timm's included.

    Raises:
        ValueError: A parametrized one.
    """
    if isinstance(module, CondConv2d) and parametrize.is_parametrized(module):
        raise ValueError("it is parametrized: remove that (torch.nn.utils.parametrize) first")
    return AcceleratedCondConv2d(module) if type(module) is CondConv2d else None
