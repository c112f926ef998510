"""CondConv (NeurIPS 2019): kernels that are a sum of experts, each weighed by a sigmoid of the input's mean."""

from .accelerated import AcceleratedCondConv2d
from .config import CondConvConfig
from .layers import CondConv1d, CondConv2d, CondConv3d, CondConvNd, CondLinear
from .operator import CondConv
from .plan import CondConvLayerPlan, CondConvPlan
from .routing import BlockRouting, RoutedBlock, Routing

__all__ = [
    "AcceleratedCondConv2d",
    "BlockRouting",
    "CondConv",
    "CondConv1d",
    "CondConv2d",
    "CondConv3d",
    "CondConvConfig",
    "CondConvLayerPlan",
    "CondConvNd",
    "CondConvPlan",
    "CondLinear",
    "RoutedBlock",
    "Routing",
]
