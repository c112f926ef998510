"""KWLayer: what all layers have in common whose kernels are mixed from a shared warehouse."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..exporting import exporting
from ..geometry import Geometry
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
from .warehouse import Warehouses

NAMES = (*IMPLEMENTATIONS, CHAINED)


class KWLayer(nn.Module):
    """What the layers have in common: an attention, a bias, and a reference to cells that somebody else owns.

    Attributes:
        implementation: "auto" takes what was measured to be the fastest for the sizes at hand (see `tuned`), or else
            what should cost least; a name in `NAMES` forces that one.
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

    def as_images(self, x: Tensor) -> Tensor:
        """The layer's input as images (B, Cin, *spatial)."""
        return x

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the kernels, and the bias, to images: (B, Cin, *spatial) → (B, Cout, *output spatial)."""
        if self.products is not None:
            if self.training:
                raise RuntimeError("a folded layer cannot be trained; fold a copy of the network")
            return folded_conv(self.attention, self.products, x, self.partition, self.geometry, self.bias)
        implementation = self._implementation(x)
        if compute := self._kernels_first(x, implementation) or self._at_once(x, implementation):
            temperature = self.warehouses.temperature
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
        temperature = self.warehouses.temperature
        if attends_at_once(self.attention, x, implementation):
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
