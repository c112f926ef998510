"""ExpertsConv: what all convolutions have in common whose kernel is a mixture of whole kernels, the experts."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..api import DynamicLayer
from ..context import exporting
from ..geometry import Geometry, Padding
from ..images import add_bias, scaled
from ..means import mean
from ..mixture_conv import IMPLEMENTATIONS, MixtureConv, Partition, Signature, mix, mixture_conv, signature_of
from ..mixture_conv.mixing import is_shared
from ..per_sample_conv import static_conv

SPREAD = 0.1  # of experts around a static kernel, as a share of its standard deviation


class Mixing(NamedTuple):
    """How each sample's kernel is made.

    Attributes:
        alpha: α, (B, parts of the kernel, n); None where the kernel is the one expert there is.
        in_scale: (B, Cin), of the input's channels, if any.
        out_scale: (B, Cout), of the output's channels, if any.
    """

    alpha: Tensor | None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None


class ExpertsConv(DynamicLayer):
    """y[b] = out_scale[b] · conv(in_scale[b] · x[b], Σ_n α[b, part, n] · W_n) + bias.

    A subclass says by `mixing` how α and the scales follow from the input; its attention is the child `attention`. The
    arguments up to `padding_mode` are those of torch's convolution of `dims` dimensions.

    Attributes:
        weight: The experts W, (n, Cout, Cin/groups, *k).
        bias: One for each expert, (n, Cout), mixed by α as the kernels are; or (Cout,) where `mixes_bias` is False;
            None without.

    Args:
        num_experts: n.
        by_position: Whether α has a part for each position of the kernel, and not one for the whole.
        device: Where the parameters are.
        dtype: Their type.

    Raises:
        ValueError: Arguments out of range, or channels that the groups do not divide.
    """

    dims: ClassVar[int]
    mixes_bias: ClassVar[bool] = True

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
        num_experts: int,
        by_position: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        size = (kernel_size,) * self.dims if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(size) != self.dims or min(size) < 1:
            raise ValueError(f"kernel_size must be {self.dims} positive whole numbers, found {size}")
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} → {out_channels} channels cannot be convolved in {groups} groups")
        if num_experts < 1:
            raise ValueError(f"there must be at least one kernel to mix, found {num_experts}")
        kernel = (out_channels, in_channels // groups, *size)
        self.partition = Partition(kernel, (*kernel[:2], *(1,) * self.dims) if by_position else kernel)
        self.geometry = Geometry.of(size, stride, padding, dilation, groups, padding_mode)
        # Under torch's names, for code that inspects convolutions.
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, size
        self.stride, self.dilation = self.geometry.stride, self.geometry.dilation
        self.padding = padding if isinstance(padding, str) else tuple(before for before, _ in self.geometry.padding)
        self.groups, self.padding_mode = groups, padding_mode
        kwargs = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, *kernel, **kwargs))
        biases = (num_experts, out_channels) if self.mixes_bias else (out_channels,)
        self.bias = nn.Parameter(torch.zeros(biases, **kwargs)) if bias else None

    @abstractmethod
    def mixing(self, x: Tensor) -> Mixing:
        """α and scales for the input x (B, Cin, *spatial)."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise as the paper, for training from scratch."""

    @abstractmethod
    def rest_attention(self) -> float:
        """Let the attention be the same for every input and temperature, by zeros in its last layers.

        It can learn from there: what multiplies its hidden vector is zero, and receives gradients.

        Returns:
            The sum over experts of α, times the scales, that it then gives.
        """

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cin, *spatial) → (B, Cout, *output spatial)."""
        self.check_input(x)
        return self.convolve(x, self.mixing(x))

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError for what are not images (B, Cin, *spatial)."""
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels or x.shape[0] == 0:
            sizes = ", ".join("DHW"[-self.dims :])
            raise ValueError(f"expected an input (B ≥ 1, {self.in_channels}, {sizes}), found {tuple(x.shape)}")

    def convolve(self, x: Tensor, mixing: Mixing) -> Tensor:
        """(B, Cin, *spatial) → (B, Cout, *output spatial), with kernels that are made so."""
        alpha, in_scale, out_scale = mixing
        if alpha is None and self.implementation == "auto":
            y = static_conv(scaled(x, in_scale), self.weight[0], self.geometry)
            return add_bias(scaled(y, out_scale), self._bias(None))
        alpha = x.new_ones(x.shape[0], self.partition.mixtures, 1) if alpha is None else alpha
        convolution = self.partition, self.geometry, self._bias(alpha), in_scale, out_scale
        return mixture_conv(x, alpha, self.weight, *convolution, self.implementation)

    def pooled(self, x: Tensor) -> Tensor:
        """The means of x over space, (B, Cin), by torch's operators where those are asked for or a graph is made."""
        if exporting() or IMPLEMENTATIONS.get(self.implementation, IMPLEMENTATIONS["cpp"]).operators == "torch":
            return x.flatten(2).mean(dim=2)
        return mean(x)

    def _bias(self, alpha: Tensor | None) -> Tensor | None:
        """(B, Cout), or (Cout,) where it is the same for all samples."""
        if self.bias is None or not self.mixes_bias:
            return self.bias
        return self.bias[0] if alpha is None else alpha[:, 0] @ self.bias.to(alpha.dtype)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, Cout, Cin/groups, *k) for the input x (B, Cin, *spatial), with all that scales them."""
        alpha, in_scale, out_scale = self.mixing(x)
        alpha = x.new_ones(x.shape[0], self.partition.mixtures, 1) if alpha is None else alpha
        kernels = mix(alpha, self.weight, self.partition)
        if out_scale is not None:
            kernels = kernels * out_scale.reshape(*out_scale.shape, *(1,) * (self.dims + 1))
        if in_scale is not None:
            share = self.out_channels // self.groups
            of_group = in_scale.reshape(x.shape[0], self.groups, 1, -1).expand(-1, -1, share, -1)
            kernels = kernels * of_group.reshape(*kernels.shape[:3], *(1,) * self.dims)
        return kernels

    def candidates(self) -> Mapping[str, MixtureConv]:
        """As `DynamicLayer`."""
        return IMPLEMENTATIONS

    def signature(self, x: Tensor) -> Signature:
        """As `DynamicLayer`."""
        shared = is_shared(self.weight, self.partition)
        return signature_of(x, len(self.weight), shared, self.partition, self.geometry, "mixture_conv")

    def unsupported(self, implementation: str) -> str | None:
        """As `DynamicLayer`, for images of the parameters' type."""
        example = self.weight.new_empty(1, self.in_channels, *self.kernel_size)
        return IMPLEMENTATIONS[implementation].supports(self.signature(example))

    def orders(self, y: Tensor) -> list[tuple[int, int, int]]:
        """As `DynamicLayer`: kernels are mixed and applied."""
        kernel, positions = math.prod(self.partition.kernel), y[0].numel() // self.out_channels
        return [(kernel * (len(self.weight) + positions), self.weight.numel(), 0)]

    @torch.no_grad()
    def load_static_weight(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over a static kernel (Cout, Cin/groups, *k) and its bias: the mixture is that kernel for every input.

        The experts lie around it, by differences that sum to zero, so that the attention learns from the first step
        and the experts can part from the second on.
        """
        share = self.rest_attention()
        spread = torch.randn_like(self.weight) * kernel.std(correction=0) * SPREAD
        self.weight.copy_((kernel + spread - spread.mean(0)) / share)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias / share if self.mixes_bias else bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExpertsConv":
        """Keep the experts' layout: ``to(memory_format=channels_last)`` would take them for images."""

        def matrix(t: Tensor) -> Tensor:
            return fn(t.flatten(1)).view(t.shape) if t.ndim > 2 else fn(t)

        return super()._apply(matrix, recurse)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, experts={len(self.weight)}, "
            f"stride={self.stride}, padding={self.padding}, groups={self.groups}, bias={self.bias is not None}"
        )
