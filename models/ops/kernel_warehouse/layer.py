"""KWLayer: what all layers have in common whose kernels are mixed from a shared warehouse."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..api import DynamicLayer
from ..context import as_type
from ..geometry import Geometry
from ..images import add_bias
from ..mixture_conv import IMPLEMENTATIONS, MixtureConv, Signature, cut, mix, signature_of
from ..mixture_conv.cost import merge_saves
from ..selection import select
from ..tied import Temperature
from .attention import Attention
from .coefficients import EPSILON
from .partition import Partition, assign
from .reassociated import Reassociated, least_cost, merge, merged, merged_coefficients, reassociate
from .warehouse import Warehouse

OPERATION = "kernel_warehouse"
CANDIDATES: Mapping[str, MixtureConv] = {**IMPLEMENTATIONS, Reassociated.name: Reassociated()}
NAMES = tuple(CANDIDATES)


class KWLayer(DynamicLayer):
    """What the layers have in common: an attention, a bias, and the warehouse that they mix from.

    Attributes:
        implementation: "auto" takes what was measured to be the fastest for the sizes at hand, or else what should cost
            least (see `select`); a name in `NAMES` forces that one.
        warehouse: The cells, shared with other layers; None in a merged layer.
        products: Attention and cells as one product (Cout, r + 1, *k, Cin/groups), in a merged layer; None elsewhere.

    Args:
        in_channels: Channels of the input.
        kernel: Shape (Cout, Cin/groups, *k) of the kernel.
        bias: Whether to add a bias.
        warehouse: The cells.
        own_cells: The range of its cells that belongs to this layer, for the assignment and the non-local basis.
        reduction: As `Attention`.
        norm: As `Attention`.
        nonlocal_basis_ratio: As `Attention`.

    Raises:
        ValueError: Cells that do not divide the kernel, or own cells outside the warehouse.
    """

    products: Tensor | None
    geometry: Geometry
    warehouse: Warehouse | None

    def __init__(
        self,
        in_channels: int,
        kernel: Sequence[int],
        bias: bool,
        *,
        warehouse: Warehouse,
        own_cells: range,
        reduction: float = 0.0625,
        norm: str = "batch",
        nonlocal_basis_ratio: float = 1.0,
    ):
        super().__init__()
        cells = warehouse.cells
        if own_cells.step != 1 or not 0 <= own_cells.start < own_cells.stop <= cells.shape[0]:
            raise ValueError(f"own cells {own_cells} are not among the warehouse's {cells.shape[0]}")
        self.partition = Partition(tuple(kernel), tuple(cells.shape[1:]))
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
        self.terms = len(cells)
        self.bias = nn.Parameter(torch.zeros(kernel[0], **kwargs)) if bias else None
        self.warehouse = warehouse
        self.temperature = Temperature(0.0, (0.0, 1.0), **kwargs)
        self.register_buffer("products", None)  # G of a merged layer

    @property
    def cells(self) -> Tensor:
        """The cells (n, *cell) of the layer's warehouse, a view."""
        warehouse = self.warehouse
        if warehouse is None:
            raise RuntimeError("a merged layer has no warehouse any more")
        return warehouse.cells

    def orders(self, y: Tensor) -> list[tuple[int, int, int]]:
        """As `DynamicLayer`: kernels mixed and applied, kernels of attention and cells first, or inputs mixed."""
        partition, n = self.partition, self.terms
        positions = y[0].numel() // partition.kernel[0]
        kernel, cell = math.prod(partition.kernel), math.prod(partition.cell)
        *_, blocks_out, _ = partition.grid
        hidden = self.attention.width
        own = len(self.attention.own_cells) * cell
        found = [
            (kernel * (n + positions), own, 0),
            (kernel * (hidden + 1 + positions), kernel * (hidden + 1), kernel * n * hidden),
        ]
        if self.geometry.groups == 1:
            mixed = n * math.prod(partition.cell[1:]) * positions
            found.append((mixed * (partition.mixtures + blocks_out * partition.cell[0]), own, 0))
        return found

    def as_authors(self) -> None:
        """As `DynamicLayer`: there, the cells lie one after the other."""
        super().as_authors()
        if self.warehouse is not None:
            weight = self.warehouse.weight
            weight.data = self.cells.detach().contiguous().transpose(0, 1)

    def as_images(self, x: Tensor) -> Tensor:
        """The layer's input as images (B, Cin, *spatial)."""
        return x

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the kernels, and the bias, to images: (B, Cin, *spatial) → (B, Cout, *output spatial)."""
        if x.shape[0] == 0:
            return add_bias(self._nothing(x), self.bias)
        signature = self._signature(x)
        chosen = select(signature, CANDIDATES, self.implementation)
        alpha, bank = self._factors(x, chosen, "torch" if signature.exporting else chosen.operators)
        if isinstance(chosen, Reassociated):
            chosen = chosen.choose(signature)
        kind = signature.dtype
        y = chosen(as_type(x, kind), as_type(alpha, kind), bank, self.partition, self.geometry)
        return add_bias(y, self.bias)

    def _nothing(self, x: Tensor) -> Tensor:
        """The output of no images, with which all that took part gets a gradient of zeros, as from torch's layers."""
        alpha, bank = self._factors(x, CANDIDATES["reference"], "torch")
        kernel = self.partition.kernel
        size = self.geometry.output_size(x.shape[2:], kernel[2:])
        zero = x.sum() + alpha.sum() + 0 * bank.sum()
        return zero.expand(0, kernel[0], *size)

    def candidates(self) -> Mapping[str, MixtureConv]:
        """As `DynamicLayer`."""
        return CANDIDATES

    def signature(self, x: Tensor) -> Signature:
        """As `DynamicLayer`."""
        return self._signature(self.as_images(x))

    def _signature(self, x: Tensor) -> Signature:
        attention = self.attention
        if self.warehouse is None:
            return signature_of(x, attention.width + 1, False, self.partition, self.geometry, OPERATION)
        linear = attention.width if attention.is_linear() else 0
        return signature_of(x, self.terms, True, self.partition, self.geometry, OPERATION, linear)

    def unsupported(self, implementation: str) -> str | None:
        """As `DynamicLayer`, for images of the parameters' type."""
        return CANDIDATES[implementation].supports(self._signature(self._example()))

    def _factors(self, x: Tensor, chosen: MixtureConv, operators: str) -> tuple[Tensor, Tensor]:
        """α (B, m, n) by the attention's `operators`, and the bank that it belongs to."""
        warehouse = self.warehouse
        if warehouse is None:
            if self.training:
                raise RuntimeError("a merged layer cannot be trained; merge a copy of the network")
            return merged_coefficients(self.attention, x.flatten(2).mean(dim=2)), self.merged_bank()
        if isinstance(chosen, Reassociated):
            pooled = x.flatten(2).mean(dim=2)
            return reassociate(self.attention, warehouse.cells, pooled, self.tau, self.partition)
        return self.attention(x, self.tau, operators), warehouse.cells

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, Cout, Cin/groups, *k) for the input x (B, Cin, *spatial)."""
        return mix(*self._factors(x, CANDIDATES["materialize"], "torch"), self.partition)

    def merged_bank(self) -> Tensor:
        """The bank (r + 1, *kernel) of a merged layer."""
        assert self.products is not None
        return self.products.movedim(-1, 2).transpose(0, 1)

    def merge_saving(self, shape: Sequence[int]) -> float:
        """What merging saves for images of a shape (B, Cin, *spatial) in inference, in multiply-adds for each of them.

        It is negative where merging costs more.
        """
        with torch.no_grad():
            signature = self._signature(self._example())._replace(images=tuple(shape))
        case = signature._replace(operation="mixture_conv")
        return merge_saves(case, least_cost(case), least_cost(merged(signature)), signature.hidden)

    def _example(self) -> Tensor:
        """Images (1, Cin, *spatial) of the parameters' type."""
        weight = self.attention.fc1.weight
        return weight.new_empty(1, self.partition.kernel[1] * self.geometry.groups, *self.partition.kernel[2:])

    def merged_values(self) -> int:
        """How many values a merged layer holds in place of its cells."""
        return (self.attention.width + 1) * math.prod(self.partition.kernel)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Multiply attention and cells (see `reassociated`), and let go of the warehouses.

        Args:
            dtype: Type in which the products are kept; the cells' by default.

        Raises:
            ValueError: A layer in training mode, at a temperature, or whose attention was changed or is watched.
        """
        if self.training or self.tau.item() != 0:
            raise ValueError("only a trained layer can be merged: in evaluation mode, at temperature 0")
        if not self.attention.is_linear():
            raise ValueError("an attention whose logits come from other layers than its own cannot be merged")
        bank = merge(self.attention, self.cells, self.partition).to(dtype or self.cells.dtype)
        self.products = bank.transpose(0, 1).movedim(2, -1).contiguous()  # as the C++ reads it
        self.warehouse = self.temperature = None

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
    def load_static_weight(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over a static kernel (Cout, Cin/groups, *k) and its bias.

        The assigned cells receive the kernel's parts, and the attention holds the assignment, so that the layer
        computes at τ = 0 what the static one did.
        """
        parts = cut(kernel.reshape(1, *self.partition.kernel), self.partition)[0]
        held = [(i, cell) for i, cell in enumerate(self.attention.held) if cell is not None]
        mixtures, cells = zip(*held, strict=True)
        self.cells[list(cells)] = (parts[list(mixtures)] * (1 + EPSILON)).to(self.cells)
        self.attention.hold_assignment()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"kernel={self.partition.kernel}, cell={self.partition.cell}, merged={self.products is not None}"
