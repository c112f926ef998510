"""CondConv1d, CondConv2d, CondConv3d and CondLinear: layers whose kernel is a sum of experts, weighed by a routing."""

import math
from collections.abc import Sequence

import torch
from timm.layers.padding import pad_same
from torch import Tensor, nn

from ..experts import ExpertsConv, Mixing
from ..geometry import Padding
from ..mixture_conv import Signature
from .routing import BlockRouting, Routing


class CondConvNd(ExpertsConv):
    """y[b] = conv(x[b], Σ_e r[b, e] W_e) + Σ_e r[b, e] b_e.

    Attributes:
        routing_fn: What gives r, from the layer's own input or from that of its block, which shares it.

    Args:
        in_channels: As torch's convolution; all up to `padding_mode`.
        out_channels: See there.
        kernel_size: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        bias: See there.
        padding_mode: See there.
        experts: E.
        routing: That of the layer's block; None makes one for its own input.
        pads_same: Whether to pad as TensorFlow's "same" instead, by the size of the input.
        device: Where the parameters are.
        dtype: Their type.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        experts: int = 8,
        routing: BlockRouting | None = None,
        pads_same: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        convolution = kernel_size, stride, 0 if pads_same else padding, dilation, groups, bias, padding_mode
        kwargs = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, *convolution, num_experts=experts, **kwargs)
        if pads_same and self.dims != 2:
            raise ValueError("padding by the size of the input is there for two dimensions only")
        self.pads_same = pads_same
        own = Routing(in_channels, experts, **kwargs) if routing is None else None
        self.routing_fn: Routing = own or routing  # pyright: ignore[reportAttributeAccessIssue] (one of them is there)
        self.reset_parameters()

    def mixing(self, x: Tensor) -> Mixing:
        """As the base class."""
        routing = self.routing_fn
        r = routing.of(x) if isinstance(routing, BlockRouting) else routing(self.pooled(x))
        return Mixing(r.unsqueeze(1))

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """(B, Cin, *spatial) → (B, Cout, *output spatial).

        Args:
            x: Images.
            routing_weights: r (B, E), in place of that of the layer or its block.
        """
        self.check_input(x)
        mixing = self.mixing(x) if routing_weights is None else Mixing(routing_weights.unsqueeze(1))
        return self.convolve(self.as_images(x), mixing)

    def as_images(self, x: Tensor) -> Tensor:
        """As `DynamicLayer`: with padding that depends on the size written out."""
        return pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)) if self.pads_same else x

    def received(self) -> tuple[Tensor, ...]:
        """As `DynamicLayer`: the block's routing."""
        current = getattr(self.routing_fn, "current", None)
        return () if current is None else (current,)

    def signature(self, x: Tensor) -> Signature:
        """As `DynamicLayer`."""
        return super().signature(self.as_images(x))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as timm's networks: each expert normal with variance 2 / (|k| · Cout / groups), biases zero."""
        fan_out = math.prod(self.kernel_size) * self.out_channels // self.groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.routing_fn.reset_parameters()

    def rest_attention(self) -> float:
        """Every r is ½."""
        nn.init.zeros_(self.routing_fn.weight)
        nn.init.zeros_(self.routing_fn.bias)
        return len(self.weight) / 2


class CondConv1d(CondConvNd):
    """The 1-D form of `CondConvNd`."""

    dims = 1


class CondConv2d(CondConvNd):
    """The 2-D form of `CondConvNd`."""

    dims = 2


class CondConv3d(CondConvNd):
    """The 3-D form of `CondConvNd`."""

    dims = 3


class CondLinear(CondConv1d):
    """y[b] = (Σ_e r[b, e] W_e) x[b] + Σ_e r[b, e] b_e: tokens are the positions of a 1×1 convolution.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        bias: Whether there are biases.
        **share: As `CondConvNd`, from `experts` on.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **share):
        super().__init__(in_features, out_features, 1, bias=bias, **share)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Tokens (B, …, in_features) → (B, …, out_features), with a routing as `CondConvNd`."""
        if x.ndim < 2 or x.shape[-1] != self.in_features or x.shape[0] == 0:
            raise ValueError(f"expected an input (B ≥ 1, …, {self.in_features}), found {tuple(x.shape)}")
        mixing = self.mixing(x) if routing_weights is None else Mixing(routing_weights.unsqueeze(1))
        y = self.convolve(self.as_images(x), mixing).transpose(1, 2)
        return y.reshape(*x.shape[:-1], self.out_features)

    def as_images(self, x: Tensor) -> Tensor:
        """(B, …, in_features) → (B, in_features, tokens)."""
        return x.reshape(x.shape[0], -1, self.in_features).transpose(1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """The means of tokens."""
        return super().pooled(self.as_images(x))

    def unsupported(self, implementation: str) -> str | None:
        """As `DynamicLayer`, for tokens of the parameters' type."""
        example = self.weight.new_empty(1, self.in_features)
        return self.candidates()[implementation].supports(self.signature(example))

    def load_static_weight(self, kernel: Tensor, bias: Tensor | None) -> None:
        """As the base class, for a matrix (out_features, in_features)."""
        super().load_static_weight(kernel.reshape(self.partition.kernel), bias)
