"""The plan of a KernelWarehouse conversion: which layer takes which cells of which warehouse."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from ...plan import ConversionPlan, LayerPlan, restored, shape_text
from .partition import Partition


@dataclass(frozen=True)
class KWLayerPlan(LayerPlan):
    """One converted layer, which shares a warehouse; a linear one has a kernel of k = 1 in each dimension of the cells.

    Attributes:
        start: First of its own cells in the warehouse.
        own_cells: How many cells are its own.
        mixtures: m, the cells that its kernel is cut into.
    """

    start: int = 0
    own_cells: int = 0
    mixtures: int = 0

    @property
    def warehouse(self) -> str:
        """Name of its warehouse."""
        return self.shares[0]


@dataclass(frozen=True)
class WarehousePlan:
    """One warehouse.

    Attributes:
        name: Its name.
        cells: n.
        cell: (cout, cin, *c).
        nonlocal_basis_ratio: As `KWConfig`.
    """

    name: str
    cells: int
    cell: tuple[int, ...]
    nonlocal_basis_ratio: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, cout, cin, *c)."""
        return (self.cells, *self.cell)


@dataclass(frozen=True)
class KWPlan(ConversionPlan):
    """What a conversion to KernelWarehouse does to a network.

    Attributes:
        warehouses: The warehouses in the order in which construction first meets them: the order of lists of ratios.
        reduction: Hidden width of the attentions, as a share of input channels.
        norm: Their normalisation, "batch" or "layer".
    """

    layers: tuple[KWLayerPlan, ...]
    warehouses: tuple[WarehousePlan, ...] = ()
    reduction: float = 0.0625
    norm: str = "batch"

    layer_type: ClassVar[type[LayerPlan]] = KWLayerPlan

    def warehouse(self, name: str) -> WarehousePlan:
        """The warehouse called `name`."""
        return next(w for w in self.warehouses if w.name == name)

    @classmethod
    def restore(cls, fields: Mapping[str, Any]) -> "KWPlan":
        """As `ConversionPlan.restore`."""
        warehouses = tuple(restored(WarehousePlan, warehouse) for warehouse in fields["warehouses"])
        plan = cast("KWPlan", super().restore({**fields, "warehouses": warehouses}))
        for layer in plan.layers:
            if Partition(layer.kernel, plan.warehouse(layer.warehouse).cell).mixtures != layer.mixtures:
                raise ValueError(f"layer {layer.name} does not have {layer.mixtures} mixtures")
        return plan

    def tables(self) -> list[list[tuple[str, ...]]]:
        """Layers with their cells, and warehouses with their shares of the parameters."""
        layers = [("layer", "kernel", "warehouse", "cell", "own cells", "mixtures")]
        for layer in self.layers:
            own = f"{layer.start}-{layer.start + layer.own_cells - 1}"
            cell = shape_text(self.warehouse(layer.warehouse).cell)
            layers.append((layer.name, shape_text(layer.kernel), layer.warehouse, cell, own, str(layer.mixtures)))
        total = self.parameters_after
        warehouses = [("warehouse", "cells", "cell", "layers", "parameters", "share")]
        for w in self.warehouses:
            users = len(self.sharing()[w.name])
            count = math.prod(w.shape)
            share = f"{count / max(total, 1):.1%}"
            warehouses.append((w.name, str(w.cells), shape_text(w.cell), str(users), f"{count:,}", share))
        return [layers, warehouses]
