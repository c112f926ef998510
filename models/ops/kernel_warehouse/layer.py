"""KWLayer: what all layers have in common whose kernels are mixed from a shared warehouse."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..api import DynamicLayer
from ..exporting import exporting
from ..geometry import Geometry
from ..tied import Temperature
from .attention import EPSILON, LEAST_HIDDEN, Attention, pool
from .attention_operator import attend_at_once, attends_at_once
from .chained import chained_conv, chains
from .folded import fold_products, folded_conv, folded_kernels
from .mixed_conv import CHAINED, IMPLEMENTATIONS, choose, computing_type, mixed_conv, resolve, supports
from .mixing import cut, mix
from .native_inference import infers_at_once, native_inference
from .native_training import native_training, trains_at_once
from .partition import Partition, assign
from .tuned import Call, anything_tuned, device_name, tuned
from .warehouse import Warehouse

NAMES = (*IMPLEMENTATIONS, CHAINED)


class KWLayer(DynamicLayer):
    """What the layers have in common: an attention, a bias, and the warehouse that they mix from.

    Attributes:
        implementation: "auto" takes what was measured to be the fastest for the sizes at hand (see `tuned`), or else
            what should cost least; a name in `NAMES` forces that one.
        warehouse: The cells, shared with other layers; None in a merged layer.
        products: Attention and cells as one product, in a merged layer; None elsewhere.

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
        self.bias = nn.Parameter(torch.zeros(kernel[0], **kwargs)) if bias else None
        self.warehouse = warehouse
        self.temperature = Temperature(0.0, (0.0, 1.0), **kwargs)
        self.register_buffer("products", None)  # G of a merged layer

    @property
    def cells(self) -> Tensor:
        """The cells (n, *cell) of the layer's warehouse, a view."""
        if self.warehouse is None:
            raise RuntimeError("a merged layer has no warehouse any more")
        return self.warehouse.cells

    def implementations(self) -> tuple[str, ...]:
        """As `DynamicLayer`."""
        return NAMES

    def orders(self, y: Tensor) -> list[tuple[int, int, int]]:
        """As `DynamicLayer`: kernels mixed and applied, kernels of attention and cells first, or inputs mixed."""
        partition, n = self.partition, len(self.cells)
        positions = y[0].numel() // partition.kernel[0]
        kernel, cell = math.prod(partition.kernel), math.prod(partition.cell)
        *_, blocks_out, _ = partition.grid
        hidden = self.attention.fc1.out_features
        own = len(self.attention.own_cells) * cell
        found = [
            (kernel * (n + positions), own, 0),
            (kernel * (hidden + 1 + positions), kernel * (hidden + 1), kernel * n * hidden),
        ]
        if self.geometry.groups == 1:
            mixed = n * math.prod(partition.cell[1:]) * positions
            found.append((mixed * (partition.mixtures + blocks_out * partition.cell[0]), own, 0))
        return found

    def as_images(self, x: Tensor) -> Tensor:
        """The layer's input as images (B, Cin, *spatial)."""
        return x

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the kernels, and the bias, to images: (B, Cin, *spatial) → (B, Cout, *output spatial)."""
        if self.products is not None:
            if self.training:
                raise RuntimeError("a merged layer cannot be trained; merge a copy of the network")
            return folded_conv(self.attention, self.products, x, self.partition, self.geometry, self.bias)
        implementation = self._implementation(x)
        if compute := self._kernels_first(x, implementation) or self._at_once(x, implementation):
            temperature = self.tau
            return compute(self.attention, self.cells, x, temperature, self.partition, self.geometry, self.bias)
        alpha, x = self._attend(x, implementation)
        return mixed_conv(alpha, self.cells, x, self.partition, self.geometry, implementation, self.bias)

    def call(self, x: Tensor) -> Call:
        """What decides how images x (B, Cin, *spatial) are convolved fastest, here and now."""
        return Call(
            self.partition,
            self.geometry,
            len(self.cells),
            self.attention.fc1.out_features,
            self.attention.num_basis,
            tuple(x.shape),
            x.stride(1) == 1,
            x.dtype,
            computing_type(x),
            torch.is_grad_enabled(),
            x.requires_grad,
            device_name(x.device),
        )

    def _implementation(self, x: Tensor) -> str:
        # A graph is made of other operations than those that were timed.
        if self.implementation != "auto" or not anything_tuned() or torch.compiler.is_compiling() or exporting():
            return self.implementation
        return tuned(self.call(x)) or "auto"

    def _kernels_first(self, x: Tensor, implementation: str) -> Callable[..., Tensor] | None:
        """What multiplies attention and cells first, for all of a batch, if that is asked for or less work."""
        wanted = implementation == CHAINED or self._saves_by_products(x, implementation)
        if not (wanted and chains(self.attention, self.partition, self.geometry)):
            return None
        return functools.partial(chained_conv, fused=implementation == "fused")

    def _saves_by_products(self, x: Tensor, implementation: str) -> bool:
        # They are rows for each hidden value, where otherwise there is a row for each sample.
        if implementation not in ("auto", "fused") or exporting() or x.shape[0] <= LEAST_HIDDEN:
            return False
        hidden, n = self.attention.fc1.out_features, self.cells.shape[0]
        if implementation == "fused":
            return (hidden + 2) * (n + x.shape[0]) < n * x.shape[0]
        return choose(self.partition, self.geometry, n, x, hidden, computing_type(x)) == CHAINED

    def _at_once(self, x: Tensor, implementation: str) -> Callable[..., Tensor] | None:
        """What computes all of the layer for x, if anything does."""
        if torch.is_grad_enabled():
            fits, compute = trains_at_once, native_training
        else:
            fits, compute = infers_at_once, native_inference
        can = (
            fits(self.attention, x, self.partition, self.geometry)
            and attends_at_once(self.attention, x, implementation)
            and computing_type(x) == x.dtype
            and resolve(implementation, self.partition, self.geometry, self.cells.shape[0], x) == "native"
        )
        return compute if can else None

    def _attend(self, x: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
        """α for x, and x, to be used in place of it from here on."""
        temperature = self.tau
        if attends_at_once(self.attention, x, implementation):
            return attend_at_once(self.attention, x, temperature)
        pooled, x = pool(x)
        return self.attention(pooled, temperature), x

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, Cout, Cin/groups, *k) for the input x (B, Cin, *spatial)."""
        if self.products is not None:
            return folded_kernels(self.attention, self.products, pool(x)[0], self.partition)
        return mix(self.attention(pool(x)[0], self.tau), self.cells, self.partition)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Multiply attention and cells (see `folded`), and let go of the warehouses.

        Args:
            dtype: Type in which the products are kept; the cells' by default.

        Raises:
            ValueError: A layer in training mode, at a temperature, whose cells cannot be streamed, or
                whose attention was changed.
        """
        if self.training or self.tau.item() != 0:
            raise ValueError("only a trained layer can be merged: in evaluation mode, at temperature 0")
        if not supports("streamed", self.partition, self.geometry):
            raise ValueError("a grouped convolution, or cells that span positions of the kernel, cannot be merged")
        if not self.attention.is_linear():
            raise ValueError("an attention whose logits come from other layers than torch's Linear cannot be merged")
        self.products = fold_products(self.attention, self.cells, self.partition).to(dtype or self.cells.dtype)
        self.warehouse = self.temperature = None

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
    def load_static_weight(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over a static kernel (Cout, Cin/groups, *k) and its bias.

        The assigned cells receive the kernel's parts, and the attention holds the assignment, so that the layer
        computes at τ = 0 what the static one did.
        """
        parts = cut(kernel.reshape(self.partition.kernel), self.partition)
        held = [(i, cell) for i, cell in enumerate(self.attention.held) if cell is not None]
        mixtures, cells = zip(*held, strict=True)
        self.cells[list(cells)] = (parts[list(mixtures)] * (1 + EPSILON)).to(self.cells)
        self.attention.hold_assignment()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        """Describe the module in `print`."""
        return f"kernel={self.partition.kernel}, cell={self.partition.cell}, merged={self.products is not None}"
