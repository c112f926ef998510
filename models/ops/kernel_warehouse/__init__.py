"""KernelWarehouse (ICML 2024): kernels mixed, per input, from a warehouse of cells shared by a stage's layers."""

from .attention import Attention
from .config import KWConfig
from .layer import NAMES, KWLayer
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear
from .operator import KernelWarehouse
from .partition import Partition, assign, count_cells, share_cells
from .plan import KWLayerPlan, KWPlan, WarehousePlan
from .warehouse import Warehouse

__all__ = [
    "NAMES",
    "Attention",
    "KWConfig",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLayer",
    "KWLayerPlan",
    "KWLinear",
    "KWPlan",
    "KernelWarehouse",
    "Partition",
    "Warehouse",
    "WarehousePlan",
    "assign",
    "count_cells",
    "share_cells",
]
