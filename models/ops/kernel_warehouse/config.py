"""What a configuration says about KernelWarehouse."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ....configs.schema import limited
from ..api import OperatorConfig

Ratios = float | tuple[float, ...]


@dataclass(frozen=True)
class KWConfig(OperatorConfig):
    """How a network is converted to KernelWarehouse; the fields bear upstream's names.

    A ratio given as a tuple holds one value for each warehouse, in the plan's order of warehouses.

    Attributes:
        cell_num_ratio: The convolutional parameter budget b: cells of a warehouse = b × its kernels' mixtures.
        cell_inplane_ratio: Input channels of a cell, as a share of the warehouse's greatest common divisor.
        cell_outplane_ratio: Output channels of a cell, likewise.
        sharing_range: Parts of layer labels (``stage1_layer0_conv2``) whose numbers are dropped, so that layers of
            the same shortened label share a warehouse; None takes the family's. ``"layer_conv"`` is read as
            ``("layer", "conv")``.
        nonlocal_basis_ratio: Below 1, logits of another layer's cells come from a basis this much smaller.
        reduction: Hidden width of the attention, as a share of the layer's input channels (at least 16 values).
        norm: Normalisation in the attention, "batch" or "layer"; None takes the family's.
        spatial_partition: Cells are 1×1 in space (all published configurations); otherwise a cell spans the whole
            kernel, and the layers of a warehouse must have one kernel size.
        include: Regular expressions over module names; layers that match one entirely are converted. None takes
            the family's choice.
        exclude: Regular expressions over module names that stay static.
        warehouses: Regular expressions over module names → warehouse, in place of the family's sharing.
    """

    operator: ClassVar[str] = "kernel_warehouse"

    cell_num_ratio: Ratios = limited(1.0, above=0, filled=True)
    cell_inplane_ratio: Ratios = limited(1.0, above=0, filled=True)
    cell_outplane_ratio: Ratios = limited(1.0, above=0, filled=True)
    sharing_range: tuple[str, ...] | None = None
    nonlocal_basis_ratio: Ratios = limited(1.0, above=0, filled=True)
    reduction: float = limited(0.0625, above=0)
    norm: Literal["batch", "layer"] | None = None
    spatial_partition: bool = True
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    warehouses: dict[str, str] | None = None

    def __post_init__(self):
        sharing: Any = self.sharing_range
        if isinstance(sharing, str):
            object.__setattr__(self, "sharing_range", tuple(filter(None, sharing.split("_"))))
        super().__post_init__()

    def ratio(self, name: str, index: int) -> float:
        """Return the ratio `name` of the warehouse with number `index`."""
        value = getattr(self, name)
        return value[index] if isinstance(value, tuple) else value
