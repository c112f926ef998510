"""DY-Conv as an operator of this package."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ...sites import Site
from ..api import Anneal, OperatorConfig, Preset
from ..experts import ExpertsConv, ExpertsOperator
from .config import DYConfig
from .layer import LIMITS, DYConv1d, DYConv2d, DYConv3d, hidden_width


class DYConv(ExpertsOperator):
    """The kernel is a mixture of K kernels by a softmax over the input's means (CVPR 2020)."""

    name: ClassVar[str] = "dyconv"
    prefix: ClassVar[str] = "dy"
    Config: ClassVar[type[OperatorConfig]] = DYConfig
    layers: ClassVar[Mapping[str, type[ExpertsConv]]] = {"Conv1d": DYConv1d, "Conv2d": DYConv2d, "Conv3d": DYConv3d}
    presets: ClassVar[Mapping[str, Preset]] = {
        "dy_resnet18": Preset("resnet18"),
        "dy_resnet50": Preset("resnet50"),
        "dy_mobilenetv2_100": Preset("mobilenetv2_100"),
        "dy_mobilenetv2_050": Preset("mobilenetv2_050"),
    }

    def anneal(self, config: DYConfig) -> Anneal | None:
        """τ from 30 to 1 over 10 epochs, or as the public code; none for a softmax over one kernel."""
        if config.kernel_num == 1:
            return None
        if config.anneal == "authors":
            return Anneal(start=34.0, end=1.0, epochs=11, step=3.0, limits=LIMITS)
        return Anneal(start=30.0, end=1.0, epochs=10, limits=LIMITS)

    def num_experts(self, config: DYConfig) -> int:
        """K."""
        return config.kernel_num

    def arguments(self, config: DYConfig) -> dict[str, Any]:
        """As the base class."""
        return {"kernel_num": config.kernel_num, "reduction": config.reduction}

    def attention_cost(self, site: Site, config: DYConfig) -> tuple[int, int]:
        """Two matrices and a bias."""
        hidden = hidden_width(site.in_channels, config.reduction, config.kernel_num)
        matrices = hidden * (site.in_channels + config.kernel_num)
        return matrices + config.kernel_num, matrices
