"""CondConvLayer: a convolution or a linear layer whose kernel is a mixture of experts, weighed by a routing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.padding import pad_same
from torch import Tensor, nn

from ..api import DynamicLayer
from ..geometry import Geometry
from ..mixture_conv import IMPLEMENTATIONS, MixtureConv, Partition, Signature, mixture_conv, signature_of
from ..mixture_conv.mixing import is_shared
from .routing import BlockRouting, Routing


class CondConvLayer(DynamicLayer):
    """y[b] = conv(x[b], Σ_e r[b, e] W_e) + Σ_e r[b, e] b_e.

    Attributes:
        weight: The experts W, (E, Cout, Cin/groups, *k).
        bias: Their biases b, (E, Cout), or None.
        routing_fn: What gives r, from the layer's own input or from that of its block, which shares it.

    Args:
        kernel: Shape (Cout, Cin/groups, *k) of a kernel.
        geometry: The convolution's arguments.
        bias: Whether there are biases.
        experts: E.
        routing: That of the layer's block; None makes one for its own input.
        tokens: Whether the layer is linear, and reads (B, …, Cin).
        pads_same: Whether it pads as TensorFlow's "same", by the size of its input.
        **kwargs: Device and type.
    """

    bias: nn.Parameter | None
    routing_fn: Routing

    def __init__(
        self,
        kernel: Sequence[int],
        geometry: Geometry,
        bias: bool,
        *,
        experts: int,
        routing: BlockRouting | None = None,
        tokens: bool = False,
        pads_same: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        kernel = tuple(kernel)
        self.partition, self.geometry = Partition(kernel, kernel), geometry
        self.tokens, self.pads_same = tokens, pads_same
        self.in_channels, self.out_channels = kernel[1] * geometry.groups, kernel[0]
        self.weight = nn.Parameter(torch.empty(experts, *kernel, **kwargs))
        self.bias = nn.Parameter(torch.zeros(experts, kernel[0], **kwargs)) if bias else None
        self.routing_fn = Routing(self.in_channels, experts, tokens, **kwargs) if routing is None else routing
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the paper's networks in timm: each expert normal with variance 2 / (|k| · Cout / groups)."""
        fan_out = math.prod(self.partition.kernel) // self.partition.kernel[1] // self.geometry.groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / max(fan_out, 1)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.routing_fn.reset_parameters()

    @torch.no_grad()
    def load_static_weight(self, kernel: Tensor, bias: Tensor | None, spread: float = 0.1) -> None:
        """Take over a static kernel and its bias: the mixture with every r = ½ is they, whatever the experts are.

        The experts differ from their mean by `spread` times its norm, in directions of chance, so that they can part:
        equal ones would have equal gradients for ever. The differences sum to zero.
        """
        experts = len(self.weight)
        mean = kernel.reshape(self.partition.kernel) * (2 / experts)
        noise = torch.randn_like(self.weight)
        noise -= noise.mean(0)
        self.weight.copy_(mean + noise * (spread * mean.square().mean().sqrt()))
        if self.bias is not None and bias is not None:
            self.bias.copy_((bias * (2 / experts)).expand_as(self.bias))
        self.routing_fn.hold()

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Images (B, Cin, *spatial) → (B, Cout, *output spatial); a linear layer's tokens (B, …, Cin) → (B, …, Cout).

        Args:
            x: The input.
            routing_weights: r (B, E), in place of that of the layer or its block.
        """
        self._check(x)
        routing = self._routing(x) if routing_weights is None else routing_weights
        bias = None if self.bias is None else routing @ self.bias.to(routing.dtype)
        y = mixture_conv(
            self.as_images(x),
            routing[:, None],
            self.weight,
            self.partition,
            self.geometry,
            bias,
            implementation=self.implementation,
        )
        return y.movedim(1, -1).reshape(*x.shape[:-1], self.out_channels) if self.tokens else y

    def _check(self, x: Tensor) -> None:
        sizes = 1 if self.tokens else len(self.geometry.stride) + 1
        fits = x.ndim > sizes if self.tokens else x.ndim == sizes + 1
        if not fits or x.shape[-1 if self.tokens else 1] != self.in_channels or x.shape[0] == 0:
            expected = f"…, {self.in_channels}" if self.tokens else f"{self.in_channels}, {sizes - 1} sizes"
            raise ValueError(f"expected an input (B ≥ 1, {expected}), found {tuple(x.shape)}")

    def _routing(self, x: Tensor) -> Tensor:
        routing = self.routing_fn
        return routing.of(x) if isinstance(routing, BlockRouting) else routing(x)

    def as_images(self, x: Tensor) -> Tensor:
        """As `DynamicLayer`: tokens as positions, and padding that depends on the size written out."""
        if self.tokens:
            return x.reshape(x.shape[0], -1, self.in_channels).movedim(-1, 1)
        if not self.pads_same:
            return x
        kernel, stride, dilation = self.partition.kernel[2:], self.geometry.stride, self.geometry.dilation
        return pad_same(x, list(kernel), list(stride), list(dilation))

    def received(self) -> tuple[Tensor, ...]:
        """As `DynamicLayer`: the block's routing."""
        current = getattr(self.routing_fn, "current", None)
        return () if current is None else (current,)

    def candidates(self) -> Mapping[str, MixtureConv]:
        """As `DynamicLayer`."""
        return IMPLEMENTATIONS

    def signature(self, x: Tensor) -> Signature:
        """As `DynamicLayer`."""
        shared = is_shared(self.weight, self.partition)
        images = self.as_images(x)
        return signature_of(images, len(self.weight), shared, self.partition, self.geometry, "mixture_conv")

    def unsupported(self, implementation: str) -> str | None:
        """As `DynamicLayer`, for inputs of the parameters' type."""
        sizes = (self.in_channels,) if self.tokens else (self.in_channels, *self.partition.kernel[2:])
        return IMPLEMENTATIONS[implementation].supports(self.signature(self.weight.new_empty(1, *sizes)))

    def orders(self, y: Tensor) -> list[tuple[int, int, int]]:
        """As `DynamicLayer`: kernels are mixed and applied."""
        kernel, experts = math.prod(self.partition.kernel), len(self.weight)
        positions = y[0].numel() // self.out_channels
        return [(kernel * (experts + positions), experts * kernel, 0)]

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, whose compiler cannot follow the choice of an implementation."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script; torch.jit.trace gives a ScriptModule for "
            "any batch size, and torch.export and torch.onnx.export work too"
        )

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        text = f"experts={len(self.weight)}, kernel={self.partition.kernel}, bias={self.bias is not None}"
        if self.tokens:
            return text
        return f"{text}, stride={self.geometry.stride}, groups={self.geometry.groups}"
