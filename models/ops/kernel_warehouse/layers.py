"""KWConv1d, KWConv2d, KWConv3d and KWLinear: layers whose kernels are mixed from a shared warehouse."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..geometry import Geometry, Padding
from .layer import KWLayer
from .warehouse import Warehouse


class KWConvNd(KWLayer):
    """y[b] = conv(x[b], W[b]) + bias with W[b] mixed from the warehouse for the sample b.

    The arguments up to `padding_mode` are those of torch's convolution of the same number of dimensions, the others
    those of `KWLayer`.

    Raises:
        ValueError: Arguments out of range, channels that groups or cells do not divide.
    """

    dims: int

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
        **share,
    ):
        kernel_size = (kernel_size,) * self.dims if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel_size) != self.dims or min(kernel_size) < 1:
            raise ValueError(f"kernel_size must be {self.dims} positive whole numbers, found {kernel_size}")
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} → {out_channels} channels cannot be convolved in {groups} groups")
        super().__init__(in_channels, (out_channels, in_channels // groups, *kernel_size), bias, **share)
        self.geometry = Geometry.of(kernel_size, stride, padding, dilation, groups, padding_mode)
        # Under torch's names, for code that inspects convolutions.
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = self.geometry.stride
        self.padding = padding if isinstance(padding, str) else tuple(before for before, _ in self.geometry.padding)
        self.dilation = self.geometry.dilation
        self.groups = groups
        self.padding_mode = padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """([B,] Cin, *spatial) → ([B,] Cout, *output spatial)."""
        if x.ndim == self.dims + 1:
            return self(x[None])[0]
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            sizes = ", ".join("DHW"[-self.dims :])
            raise ValueError(f"expected an input ([B,] {self.in_channels}, {sizes}), found {tuple(x.shape)}")
        return self.convolve(x)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}, groups={self.groups}"


class KWConv1d(KWConvNd):
    """The 1-D form of `KWConvNd`."""

    dims = 1


class KWConv2d(KWConvNd):
    """The 2-D form of `KWConvNd`."""

    dims = 2


class KWConv3d(KWConvNd):
    """The 3-D form of `KWConvNd`."""

    dims = 3


class KWLinear(KWLayer):
    """y[b] = x[b] W[b]ᵀ + bias over the tokens of a sample; the attention pools over the tokens.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        bias: Whether to add a bias.
        warehouse: As `KWLayer`; the cells are (cout, cin, 1, …) with any number of ones.
        **share: As `KWLayer`.

    Raises:
        ValueError: Cells that do not divide the matrix.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        warehouse: Warehouse,
        **share,
    ):
        kernel = (out_features, in_features, *(1,) * (warehouse.cells.ndim - 3))
        super().__init__(in_features, kernel, bias, warehouse=warehouse, **share)
        self.geometry = Geometry.of(kernel[2:])  # tokens are the positions of a 1×1 convolution
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """([B,] *tokens, in_features) → ([B,] *tokens, out_features); of several dimensions the first is the batch."""
        if x.ndim == 1:
            return self(x[None])[0]
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected an input ([B,] …, {self.in_features}), found {tuple(x.shape)}")
        y = self.convolve(self.as_images(x)).movedim(1, -1)
        return y.reshape(*x.shape[:-1], self.out_features)

    def as_images(self, x: Tensor) -> Tensor:
        """(B, *tokens, in_features) → (B, in_features, tokens, 1, …): tokens as the positions of a 1×1 convolution."""
        ones = (1,) * (len(self.geometry.stride) - 1)
        return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), *ones, self.in_features).movedim(-1, 1)
