"""KWConv1d, KWConv2d, KWConv3d and KWLinear: layers whose kernels are mixed from a shared warehouse."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..exporting import exporting
from ..geometry import Geometry, Padding
from .attention import EPSILON, LEAST_HIDDEN, Attention, pool
from .attention_operator import attend_at_once, attends_at_once
from .chained import chained_conv, chains
from .folded import fold_products, folded_conv, folded_kernels
from .mixed_conv import CHAINED, IMPLEMENTATIONS, choose, computing_type, mixed_conv, resolve, supports
from .mixing import cut, mix
from .native_inference import infers_at_once, native_inference
from .native_training import native_training, trains_at_once
from .partition import Partition, assign
from .warehouse import Warehouses

NAMES = (*IMPLEMENTATIONS, CHAINED)


class KWLayer(nn.Module):
    """What the layers have in common: an attention, a bias, and a reference to cells that somebody else owns.

    Attributes:
        implementation: "auto" takes what costs least for the sizes at hand; a name in `NAMES` forces that one.
        products: Attention and cells as one product, in a folded layer; None elsewhere.

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

    implementation: str = "auto"
    products: Tensor | None
    geometry: Geometry

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
        self.register_buffer("products", None)  # G of a folded layer

    @property
    def warehouses(self) -> Warehouses:
        """The owner of the cells and of the temperature."""
        if not self._owner:
            raise RuntimeError("a folded layer has no warehouse any more")
        return self._owner[0]

    @property
    def cells(self) -> nn.Parameter:
        """The cells (n, *cell) of the layer's warehouse."""
        return self.warehouses.cells(self.warehouse)

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the kernels, and the bias, to images: (B, Cin, *spatial) → (B, Cout, *output spatial)."""
        if self.products is not None:
            if self.training:
                raise RuntimeError("a folded layer cannot be trained; fold a copy of the network")
            return folded_conv(self.attention, self.products, x, self.partition, self.geometry, self.bias)
        if compute := self._kernels_first(x) or self._at_once(x):
            temperature = self.warehouses.temperature
            return compute(self.attention, self.cells, x, temperature, self.partition, self.geometry, self.bias)
        alpha, x = self._attend(x)
        return mixed_conv(alpha, self.cells, x, self.partition, self.geometry, self.implementation, self.bias)

    def _kernels_first(self, x: Tensor) -> Callable[..., Tensor] | None:
        """What multiplies attention and cells first, for all of a batch, if that is asked for or less work."""
        wanted = self.implementation == CHAINED or self._saves_by_products(x)
        if not (wanted and chains(self.attention, self.partition, self.geometry)):
            return None
        return functools.partial(chained_conv, fused=self.implementation == "fused")

    def _saves_by_products(self, x: Tensor) -> bool:
        # They are rows for each hidden value, where otherwise there is a row for each sample.
        if self.implementation not in ("auto", "fused") or exporting() or x.shape[0] <= LEAST_HIDDEN:
            return False
        hidden, n = self.attention.fc1.out_features, self.cells.shape[0]
        if self.implementation == "fused":
            return (hidden + 2) * (n + x.shape[0]) < n * x.shape[0]
        return choose(self.partition, self.geometry, n, x, hidden, computing_type(x)) == CHAINED

    def _at_once(self, x: Tensor) -> Callable[..., Tensor] | None:
        """What computes all of the layer for x, if anything does."""
        if torch.is_grad_enabled():
            fits, compute = trains_at_once, native_training
        else:
            fits, compute = infers_at_once, native_inference
        can = (
            fits(self.attention, x, self.partition, self.geometry)
            and attends_at_once(self.attention, x, self.implementation)
            and computing_type(x) == x.dtype
            and resolve(self.implementation, self.partition, self.geometry, self.cells.shape[0], x) == "native"
        )
        return compute if can else None

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """α for x, and x, to be used in place of it from here on."""
        temperature = self.warehouses.temperature
        if attends_at_once(self.attention, x, self.implementation):
            return attend_at_once(self.attention, x, temperature)
        pooled, x = pool(x)
        return self.attention(pooled, temperature), x

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, Cout, Cin/groups, *k) for the input x (B, Cin, *spatial)."""
        if self.products is not None:
            return folded_kernels(self.attention, self.products, pool(x)[0], self.partition)
        return mix(self.attention(pool(x)[0], self.warehouses.temperature), self.cells, self.partition)

    @torch.no_grad()
    def fold(self, dtype: torch.dtype | None = None) -> None:
        """Multiply attention and cells (see `folded`), and let go of the warehouses.

        Args:
            dtype: Type in which the products are kept; the cells' by default.

        Raises:
            ValueError: A layer in training mode, at a temperature, whose cells cannot be streamed, or
                whose attention was changed.
        """
        if self.training or self.warehouses.temperature.item() != 0:
            raise ValueError("only a trained layer can be folded: in evaluation mode, at temperature 0")
        if not supports("streamed", self.partition, self.geometry):
            raise ValueError("a grouped convolution, or cells that span positions of the kernel, cannot be folded")
        if not self.attention.is_linear():
            raise ValueError("an attention whose logits come from other layers than torch's Linear cannot be folded")
        self.products = fold_products(self.attention, self.cells, self.partition).to(dtype or self.cells.dtype)
        self.warehouses.folded = True
        self._owner = ()

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
        drawn = torch.empty(cells.shape, dtype=cells.dtype, device=cells.device).flatten(0, 1)
        nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu")
        cells.copy_(drawn.view(cells.shape))
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


def set_implementation(model: nn.Module, implementation: str) -> None:
    """Make every converted layer of `model` compute in one way, to compare or to time it.

    Args:
        model: A converted network, or a module that contains one.
        implementation: "auto", or a name in `NAMES`.

    Raises:
        ValueError: An unknown name, or a model without a converted layer.
    """
    if implementation not in ("auto", *NAMES):
        raise ValueError(f"implementation must be auto, {', '.join(NAMES)}; found {implementation!r}")
    layers = [module for module in model.modules() if isinstance(module, KWLayer)]
    if not layers:
        raise ValueError("the model has no converted layer")
    for layer in layers:
        layer.implementation = implementation


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
        self.geometry = Geometry.of(kernel[2:])  # tokens are the positions of a 1×1 convolution
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, *tokens, in_features) → (B, *tokens, out_features); the first dimension is the batch."""
        if x.ndim < 2 or x.shape[-1] != self.in_features or x.shape[0] == 0:
            raise ValueError(f"expected an input (B ≥ 1, …, {self.in_features}), found {tuple(x.shape)}")
        tokens = x.reshape(x.shape[0], -1, *(1,) * (len(self.geometry.stride) - 1), self.in_features)
        y = self.convolve(tokens.movedim(-1, 1)).movedim(1, -1)
        return y.reshape(*x.shape[:-1], self.out_features)
