"""KWConv1d, KWConv2d, KWConv3d and KWLinear: layers whose kernels are mixed from a shared warehouse."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..dynamic_conv import Geometry, dynamic_conv_from_geometry, windows
from ..dynamic_conv.geometry import Padding
from .attention import EPSILON, Attention
from .mixing import cut, mix, mix_inputs, prefers_inputs
from .partition import Partition, assign
from .warehouse import Warehouses


class KWLayer(nn.Module):
    """What the layers have in common: an attention, a bias, and a reference to cells that somebody else owns.

    Attributes:
        order: "kernels" mixes kernels and convolves each sample with its own, "inputs" mixes inputs and applies the
            cells to all samples at once (see `mixing`); "auto" takes what costs less for the sizes at hand.

    Args:
        in_channels: Channels of the input.
        kernel: Shape (Cout, Cin/groups, *k) of the kernel.
        bias: Whether to add a bias.
        warehouses: Owner of the cells, referred to and not registered.
        warehouse: Name of the layer's warehouse in it.
        own_cells: The range of its cells that belongs to this layer, for the assignment and the non-local basis.
        reduction: As `Attention`.
        norm: As `Attention`.
        nonlocal_basis_ratio: As `Attention`.

    Raises:
        ValueError: Cells that do not divide the kernel, or own cells outside the warehouse.
    """

    order: Literal["auto", "kernels", "inputs"] = "auto"

    def __init__(
        self,
        in_channels: int,
        kernel: Sequence[int],
        bias: bool,
        *,
        warehouses: Warehouses,
        warehouse: str,
        own_cells: range,
        reduction: float = 0.0625,
        norm: str = "batch",
        nonlocal_basis_ratio: float = 1.0,
    ):
        super().__init__()
        if warehouse not in warehouses.names:
            raise ValueError(f"no warehouse {warehouse!r}; there are {', '.join(warehouses.names)}")
        cells = warehouses.cells(warehouse)
        if own_cells.step != 1 or not 0 <= own_cells.start < own_cells.stop <= cells.shape[0]:
            raise ValueError(f"own cells {own_cells} are not among the {cells.shape[0]} cells of {warehouse!r}")
        self.warehouse = warehouse
        self.partition = Partition(tuple(kernel), tuple(cells.shape[1:]))
        # A tuple hides the module from registration, while deepcopy and pickle still see one shared object.
        self._owner = (warehouses,)
        kwargs = {"device": cells.device, "dtype": cells.dtype}
        self.attention = Attention(
            in_channels,
            cells.shape[0],
            own_cells,
            assign(self.partition.mixtures, len(own_cells), own_cells.start),
            reduction,
            norm,
            nonlocal_basis_ratio,
            **kwargs,
        )
        self.bias = nn.Parameter(torch.zeros(kernel[0], **kwargs)) if bias else None

    @property
    def warehouses(self) -> Warehouses:
        """The owner of the cells and of the temperature."""
        return self._owner[0]

    @property
    def cells(self) -> nn.Parameter:
        """The cells (n, *cell) of the layer's warehouse."""
        return self.warehouses.cells(self.warehouse)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, Cout, Cin/groups, *k) for the input x (B, Cin, *spatial)."""
        return mix(self.attention(x, self.warehouses.temperature), self.cells, self.partition)

    def mixes_inputs(self, positions: int) -> bool:
        """Whether to mix inputs, not kernels, for that many output positions of a sample."""
        if self.order == "auto":
            # A graph for export must not depend on the size that it happens to be made with.
            exporting = torch.jit.is_tracing() or torch.compiler.is_exporting()
            return not exporting and prefers_inputs(self.partition, self.cells.shape[0], positions)
        return self.order == "inputs"

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, whose compiler knows no cells that belong to another module."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script; torch.jit.trace gives a ScriptModule for "
            "any batch size, and torch.export and torch.onnx.export work too"
        )

    def static_kernel(self) -> Tensor:
        """The kernel (Cout, Cin/groups, *k) made of the assigned cells: the layer's own at temperature 1."""
        return mix(self.attention.assignment[None], self.cells, self.partition)[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the paper: Kaiming normal over the fan out, for the attention and for the own cells."""
        self.attention.reset_parameters()
        own = self.attention.own_cells
        cells = self.cells[own.start : own.stop]
        nn.init.kaiming_normal_(cells.view(-1, *cells.shape[2:]), mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def hold(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over a static kernel (Cout, Cin/groups, *k) and its bias.

        The assigned cells receive the kernel's parts, and the attention holds the assignment, so that the layer
        computes at τ = 0 what the static one did. With fewer own cells than mixtures only the assigned parts are kept.
        """
        parts = cut(kernel.reshape(self.partition.kernel), self.partition)
        mixture, cell = self.attention.assignment.nonzero(as_tuple=True)
        self.cells[cell] = (parts[mixture] * (1 + EPSILON)).to(self.cells)
        self.attention.hold_assignment()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"kernel={self.partition.kernel}, cell={self.partition.cell}, warehouse={self.warehouse}"


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
        """(B, Cin, *spatial) → (B, Cout, *output spatial)."""
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels or x.shape[0] == 0:
            sizes = ", ".join("DHW"[-self.dims :])
            raise ValueError(f"expected an input (B ≥ 1, {self.in_channels}, {sizes}), found {tuple(x.shape)}")
        size = self.geometry.output_size(x.shape[2:], self.kernel_size)
        # In a grouped convolution the output channels of one cell may read different inputs.
        if self.groups > 1 or not self.mixes_inputs(math.prod(size)):
            return dynamic_conv_from_geometry(x, self.kernels(x), self.bias, self.geometry)
        alpha = self.attention(x, self.warehouses.temperature)
        y = mix_inputs(alpha, self.cells, self._parts(x), self.partition)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.transpose(1, 2).reshape(x.shape[0], self.out_channels, *size)

    def _parts(self, x: Tensor) -> Tensor:
        """What each part of the kernel reads of x, as `mix_inputs` takes it."""
        dims = self.dims
        *blocks, _, blocks_in = self.partition.grid
        _, cin, *c = self.partition.cell
        seen = windows(x, self.kernel_size, self.geometry)
        size = seen.shape[2 : 2 + dims]
        seen = seen.reshape(x.shape[0], blocks_in, cin, *size, *itertools.chain(*zip(blocks, c, strict=True)))
        spatial, inside = range(3 + dims, 3 + 3 * dims, 2), range(4 + dims, 3 + 3 * dims, 2)
        seen = seen.permute(0, *spatial, 1, *range(3, 3 + dims), 2, *inside)
        return seen.reshape(x.shape[0], math.prod(blocks) * blocks_in, math.prod(size), -1)

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
        warehouses: As `KWLayer`; the cells are (cout, cin, 1, …) with any number of ones.
        warehouse: As `KWLayer`.
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
        warehouses: Warehouses,
        warehouse: str,
        **share,
    ):
        kernel = (out_features, in_features, *(1,) * (warehouses.cells(warehouse).ndim - 3))
        super().__init__(in_features, kernel, bias, warehouses=warehouses, warehouse=warehouse, **share)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, *tokens, in_features) → (B, *tokens, out_features); the first dimension is the batch."""
        if x.ndim < 2 or x.shape[-1] != self.in_features or x.shape[0] == 0:
            raise ValueError(f"expected an input (B ≥ 1, …, {self.in_features}), found {tuple(x.shape)}")
        tokens = x.reshape(x.shape[0], -1, self.in_features)
        alpha = self.attention(tokens.transpose(1, 2), self.warehouses.temperature)
        if self.mixes_inputs(tokens.shape[1]):
            parts = tokens.unflatten(2, (-1, self.partition.cell[1])).transpose(1, 2)
            y = mix_inputs(alpha, self.cells, parts, self.partition)
        else:
            y = torch.matmul(tokens, mix(alpha, self.cells, self.partition).flatten(2).mT)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)
