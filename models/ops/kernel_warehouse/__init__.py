"""KernelWarehouse (ICML 2024): kernels mixed, per input, from a warehouse of cells shared by a stage's layers."""

from .attention import Attention
from .layer import NAMES, KWLayer, set_implementation
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear
from .partition import Partition, assign, count_cells, share_cells
from .warehouse import Warehouses, set_temperature

__all__ = [
    "NAMES",
    "Attention",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLayer",
    "KWLinear",
    "Partition",
    "Warehouses",
    "assign",
    "count_cells",
    "set_implementation",
    "set_temperature",
    "share_cells",
]
