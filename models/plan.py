"""The plan of a conversion: which layer takes which cells of which warehouse. Pure data: printable, serialisable."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .ops.kernel_warehouse.attention import parameter_count
from .ops.kernel_warehouse.partition import Partition


@dataclass(frozen=True)
class LayerPlan:
    """One converted layer.

    Attributes:
        name: The module's name in the network.
        kind: Class of torch.nn that it is now: Conv1d, Conv2d, Conv3d or Linear.
        in_channels: Channels of its input.
        kernel: (Cout, Cin/groups, *k); a linear layer has k = 1 in each dimension of its warehouse's cells.
        warehouse: Name of its warehouse.
        start: First of its own cells in the warehouse.
        own_cells: How many cells are its own.
        mixtures: m, the cells that its kernel is cut into.
    """

    name: str
    kind: str
    in_channels: int
    kernel: tuple[int, ...]
    warehouse: str
    start: int
    own_cells: int
    mixtures: int


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
class ConversionPlan:
    """What `convert_` will do to a network.

    Attributes:
        layers: The layers in the order of ``network.modules()``, in which they take their cells.
        warehouses: The warehouses in the order in which construction first meets them: the order of lists of ratios.
        reduction: Hidden width of the attentions, as a share of input channels.
        norm: Their normalisation, "batch" or "layer".
        parameters_before: Parameters of the static network.
    """

    layers: tuple[LayerPlan, ...]
    warehouses: tuple[WarehousePlan, ...]
    reduction: float
    norm: str
    parameters_before: int

    def warehouse(self, name: str) -> WarehousePlan:
        """The warehouse called `name`."""
        return next(w for w in self.warehouses if w.name == name)

    @property
    def parameters_after(self) -> int:
        """Parameters of the converted network."""
        count = self.parameters_before + sum(math.prod(w.shape) for w in self.warehouses)
        for layer in self.layers:
            warehouse = self.warehouse(layer.warehouse)
            count -= math.prod(layer.kernel)
            count += parameter_count(
                layer.in_channels,
                warehouse.cells,
                layer.own_cells,
                layer.mixtures,
                self.reduction,
                self.norm,
                warehouse.nonlocal_basis_ratio,
            )
        return count

    @property
    def mixing_macs(self) -> int:
        """Multiply-accumulates of mixing for one image: Σ over layers of m · n · |cell|."""
        return sum(math.prod(layer.kernel) * self.warehouse(layer.warehouse).cells for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON or a checkpoint."""
        return dataclasses.asdict(self, dict_factory=_plain)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ConversionPlan":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: Something else.
        """
        try:
            layers = tuple(_restore(LayerPlan, layer) for layer in data["layers"])
            warehouses = tuple(_restore(WarehousePlan, warehouse) for warehouse in data["warehouses"])
            plan = cls(**{**data, "layers": layers, "warehouses": warehouses})
            for layer in plan.layers:
                if Partition(layer.kernel, plan.warehouse(layer.warehouse).cell).mixtures != layer.mixtures:
                    raise ValueError(f"layer {layer.name} does not have {layer.mixtures} mixtures")
        except (KeyError, TypeError, StopIteration, ValueError) as e:
            raise ValueError(f"this is not a conversion plan: {e!r}") from e
        return plan

    def __str__(self) -> str:
        layers = [("layer", "kernel", "warehouse", "cell", "own cells", "mixtures")]
        for layer in self.layers:
            own = f"{layer.start}-{layer.start + layer.own_cells - 1}"
            cell = self.warehouse(layer.warehouse).cell
            layers.append((layer.name, _shape(layer.kernel), layer.warehouse, _shape(cell), own, str(layer.mixtures)))
        total = self.parameters_after
        warehouses = [("warehouse", "cells", "cell", "layers", "parameters", "share")]
        for w in self.warehouses:
            users = sum(layer.warehouse == w.name for layer in self.layers)
            count = math.prod(w.shape)
            warehouses.append(
                (w.name, str(w.cells), _shape(w.cell), str(users), f"{count:,}", f"{count / max(total, 1):.1%}")
            )
        summary = (
            f"parameters {self.parameters_before:,} → {total:,}; mixing {self.mixing_macs / 1e6:,.1f} M MACs an image"
        )
        return "\n\n".join((_table(layers), _table(warehouses), summary))


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in items}


def _restore(cls: type, data: Mapping[str, Any]) -> Any:
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _shape(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
