"""ODConv as an operator of this package."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ...sites import Site
from ..api import Anneal, OperatorConfig, Preset
from ..experts import ExpertsConv, ExpertsOperator
from .attention import head_widths, hidden_width
from .config import ODConfig
from .layer import LIMITS, ODConv1d, ODConv2d, ODConv3d


class ODConv(ExpertsOperator):
    """Four attentions, over the kernels, their positions, and the channels of input and output (ICLR 2022)."""

    name: ClassVar[str] = "odconv"
    prefix: ClassVar[str] = "od"
    Config: ClassVar[type[OperatorConfig]] = ODConfig
    layers: ClassVar[Mapping[str, type[ExpertsConv]]] = {"Conv1d": ODConv1d, "Conv2d": ODConv2d, "Conv3d": ODConv3d}
    presets: ClassVar[Mapping[str, Preset]] = {
        "od_resnet18": Preset("resnet18"),
        "od_resnet50": Preset("resnet50"),
        "od_mobilenetv2_100": Preset("mobilenetv2_100"),
        "od_mobilenetv2_075": Preset("mobilenetv2_075"),
        "od_mobilenetv2_050": Preset("mobilenetv2_050"),
    }

    def anneal(self, config: ODConfig) -> Anneal:
        """τ from 30 to 1 over 10 epochs, for the sigmoids too."""
        del config
        return Anneal(start=30.0, end=1.0, epochs=10, limits=LIMITS)

    def num_experts(self, config: ODConfig) -> int:
        """n."""
        return config.kernel_num

    def arguments(self, config: ODConfig) -> dict[str, Any]:
        """As the base class."""
        return {"kernel_num": config.kernel_num, "reduction": config.reduction}

    def placed(self, site: Site) -> bool:
        """Not the shortcuts of residual blocks."""
        return super().placed(site) and site.role != "downsample"

    def attention_cost(self, site: Site, config: ODConfig) -> tuple[int, int]:
        """A hidden layer with its norm, and the heads; what scales inputs, outputs and positions is counted too."""
        hidden = hidden_width(site.in_channels, config.reduction)
        positions = math.prod(site.kernel[2:])
        widths = head_widths(site.in_channels, site.out_channels, site.groups, positions, config.kernel_num)
        heads = sum(widths.values())
        matrices = hidden * (site.in_channels + heads)
        return matrices + 2 * hidden + heads, matrices
