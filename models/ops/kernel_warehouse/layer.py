"""KWLayer: what all layers have in common whose kernels are mixed from a shared warehouse."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..context import exporting
from ..geometry import Geometry
from ..images import add_bias
from ..mixture_conv import IMPLEMENTATIONS, MixtureConv, Signature, cut, mix, signature_of
from ..mixture_conv.cost import merge_saves
from ..selection import select
from .attention import Attention
from .coefficients import EPSILON
from .partition import Partition, assign
from .reassociated import Reassociated, least_cost, merge, merged, merged_coefficients, reassociate
from .warehouse import Warehouses

OPERATION = "kernel_warehouse"
CANDIDATES: Mapping[str, MixtureConv] = {**IMPLEMENTATIONS, Reassociated.name: Reassociated()}
NAMES = tuple(CANDIDATES)


class KWLayer(nn.Module):
    """What the layers have in common: an attention, a bias, and a reference to cells that somebody else owns.

    Attributes:
        implementation: "auto" takes what was measured to be the fastest for the sizes at hand, or else what should cost
            least (see `select`); a name in `NAMES` forces that one.
        products: Attention and cells as one product (Cout, r + 1, *k, Cin/groups), in a merged layer; None elsewhere.

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
        self.register_buffer("products", None)  # of a merged layer

    @property
    def warehouses(self) -> Warehouses:
        """The owner of the cells and of the temperature."""
        if not self._owner:
            raise RuntimeError("a merged layer has no warehouse any more")
        return self._owner[0]

    @property
    def cells(self) -> nn.Parameter:
        """The cells (n, *cell) of the layer's warehouse."""
        return self.warehouses.cells(self.warehouse)

    def as_images(self, x: Tensor) -> Tensor:
        """The layer's input as images (B, Cin, *spatial)."""
        return x

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar tensor."""
        return self.warehouses.temperature

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the kernels, and the bias, to images: (B, Cin, *spatial) → (B, Cout, *output spatial)."""
        signature = self._signature(x)
        chosen = select(signature, CANDIDATES, self.implementation)
        alpha, bank = self._factors(x, chosen)
        if isinstance(chosen, Reassociated):
            chosen = chosen.choose(signature)
        kind = signature.dtype
        y = chosen(x.to(kind), alpha.to(kind), bank, self.partition, self.geometry)
        return add_bias(y, self.bias)

    def candidates(self, _signature: Signature) -> Mapping[str, MixtureConv]:
        """The implementations that are chosen from, by name."""
        return CANDIDATES

    def signature(self, x: Tensor) -> Signature:
        """What decides how the layer is computed for an input, here and now."""
        return self._signature(self.as_images(x))

    def _signature(self, x: Tensor) -> Signature:
        hidden = self.attention.fc1.out_features
        if self.products is not None:
            return signature_of(x, hidden + 1, False, self.partition, self.geometry, OPERATION)
        linear = hidden if self.attention.is_linear() else 0
        return signature_of(x, len(self.cells), True, self.partition, self.geometry, OPERATION, linear)

    def unsupported(self, implementation: str) -> str | None:
        """Why an implementation cannot compute the layer for images of its parameters' type; None if it can."""
        weight = self.attention.fc1.weight
        x = weight.new_empty(1, self.partition.kernel[1] * self.geometry.groups, *self.partition.kernel[2:])
        return CANDIDATES[implementation].supports(self._signature(x))

    def _factors(self, x: Tensor, chosen: MixtureConv) -> tuple[Tensor, Tensor]:
        """α (B, m, n), and the bank that it belongs to."""
        if self.products is not None:
            if self.training:
                raise RuntimeError("a merged layer cannot be trained; merge a copy of the network")
            return merged_coefficients(self.attention, x.flatten(2).mean(dim=2)), self.merged_bank
        if isinstance(chosen, Reassociated):
            pooled = x.flatten(2).mean(dim=2)
            return reassociate(self.attention, self.cells, pooled, self.temperature, self.partition)
        return self.attention(x, self.temperature, "torch" if exporting() else chosen.operators), self.cells

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, Cout, Cin/groups, *k) for the input x (B, Cin, *spatial)."""
        return mix(*self._factors(x, CANDIDATES["materialize"]), self.partition)

    @property
    def merged_bank(self) -> Tensor:
        """The bank (r + 1, *kernel) of a merged layer."""
        return self.products.movedim(-1, 2).transpose(0, 1)

    def merge_saving(self, x: Tensor) -> float:
        """What merging saves for an input in inference, in multiply-adds for each of its samples.

        It is negative where merging costs more, or cannot be done.
        """
        if not self.attention.is_linear():
            return -math.inf
        with torch.no_grad():
            signature = self.signature(x)
            case = signature._replace(operation="mixture_conv")
            return merge_saves(case, least_cost(case), least_cost(merged(signature)), signature.hidden)

    def merged_values(self) -> int:
        """How many values a merged layer holds in place of its cells."""
        return (self.attention.fc1.out_features + 1) * math.prod(self.partition.kernel)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Multiply attention and cells (see `reassociated`), and let go of the warehouses.

        Args:
            dtype: Type in which the products are kept; the cells' by default.

        Raises:
            ValueError: A layer in training mode, at a temperature, or whose attention was changed or is watched.
        """
        if self.training or self.temperature.item() != 0:
            raise ValueError("only a trained layer can be merged: in evaluation mode, at temperature 0")
        if not self.attention.is_linear():
            raise ValueError("an attention whose logits come from other layers than its own cannot be merged")
        bank = merge(self.attention, self.cells, self.partition).to(dtype or self.cells.dtype)
        self.products = bank.transpose(0, 1).movedim(2, -1).contiguous()  # as the C++ reads it
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
        parts = cut(kernel.reshape(1, *self.partition.kernel), self.partition)[0]
        mixture, cell = self.attention.assignment.nonzero(as_tuple=True)
        self.cells[cell] = (parts[mixture] * (1 + EPSILON)).to(self.cells)
        self.attention.hold_assignment()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"kernel={self.partition.kernel}, cell={self.partition.cell}, warehouse={self.warehouse}"


def set_implementation(model: nn.Module, implementation: str, otherwise: str | None = None) -> None:
    """Make every converted layer of `model` compute in one way, to compare or to time it.

    Args:
        model: A converted network, or a module that contains one.
        implementation: "auto", or a name in `NAMES`. "reference" has every kind of derivative.
        otherwise: What the layers take that cannot compute so: "auto", or another name.

    Raises:
        ValueError: An unknown name, a model without a converted layer, or a layer that cannot compute so.
    """
    for name in (implementation, otherwise or "auto"):
        if name not in ("auto", *NAMES):
            raise ValueError(f"implementation must be auto, {', '.join(NAMES)}; found {name!r}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KWLayer)}
    if not layers:
        raise ValueError("the model has no converted layer")
    chosen = {name: implementation for name in layers}
    for name, layer in layers.items():
        reason = None if implementation == "auto" else layer.unsupported(implementation)
        if reason is not None and otherwise is None:
            raise ValueError(f"{name}: implementation {implementation!r} cannot compute this layer: {reason}")
        chosen[name] = implementation if reason is None else otherwise
    for name, layer in layers.items():
        layer.implementation = chosen[name]
