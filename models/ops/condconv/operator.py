"""CondConv as an operator of this package."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ...layers import pads_same
from ...plan import ConversionPlan
from ...sites import Site, Sites
from ...translation import Translation
from ..api import DynamicLayer, OperatorConfig, Preset
from ..experts import ExpertsConv, ExpertsOperator
from ..experts.operator import ARGUMENTS
from ..tied import Tied
from .accelerated import accelerated
from .checkpoint import CondConvTranslation
from .config import CondConvConfig
from .layers import CondConv1d, CondConv2d, CondConv3d, CondLinear
from .plan import CondConvPlan, make_plan
from .routing import BlockRouting, check_block, route_block_

# The paper's placements: the last blocks of a network with one routing for each, and the classifier but in timm's
# EfficientNets.
_EFFICIENTNET = {"routing": "block", "include": (r"blocks\.[456]\.\d+\.conv_(pw|dw|pwl)",)}
_MOBILENETV2 = {"routing": "block", "include": (r"blocks\.(4\.[12]|5\.\d|6\.0)\.conv_(pw|dw|pwl)|classifier",)}
_RESNET18 = {"routing": "block", "include": (r"(layer3\.1|layer4\.\d)\.conv\d|fc",)}
_RESNET50 = {"routing": "block", "include": (r"layer4\.\d\.conv\d|fc",)}


class CondConv(ExpertsOperator):
    """Kernels that are a sum of experts, each weighed by a sigmoid of the input's mean (NeurIPS 2019)."""

    name: ClassVar[str] = "condconv"
    prefix: ClassVar[str] = "cond"
    Config: ClassVar[type[OperatorConfig]] = CondConvConfig
    Plan: ClassVar[type[ConversionPlan]] = CondConvPlan
    layers: ClassVar[Mapping[str, type[ExpertsConv]]] = {
        "Conv1d": CondConv1d,
        "Conv2d": CondConv2d,
        "Conv3d": CondConv3d,
        "Linear": CondLinear,
    }
    presets: ClassVar[Mapping[str, Preset]] = {
        "cond_resnet18": Preset("resnet18", _RESNET18),
        "cond_resnet50": Preset("resnet50", _RESNET50),
        "cond_mobilenetv2_050": Preset("mobilenetv2_050", _MOBILENETV2),
        "cond_mobilenetv2_075": Preset("mobilenetv2_075", _MOBILENETV2),
        "cond_mobilenetv2_100": Preset("mobilenetv2_100", _MOBILENETV2),
        "cond_tf_efficientnet_b0": Preset("tf_efficientnet_b0", _EFFICIENTNET),
        "cond_tf_efficientnet_b1": Preset("tf_efficientnet_b1", _EFFICIENTNET),
    }

    def plan(self, sites: Sites, config: CondConvConfig) -> CondConvPlan:
        """As `Operator.plan`."""
        return make_plan(sites, config, tuple(self.layers))

    def shared(self, plan: CondConvPlan, device: torch.device, dtype: torch.dtype) -> dict[str, Tied]:
        """The routings of blocks."""
        experts, firsts = plan.config.experts, {la.shares[0]: la for la in plan.layers if la.block}
        return {
            name: BlockRouting(la.routing_channels, experts, la.routing_tokens, device=device, dtype=dtype)
            for name, la in firsts.items()
        }

    def num_experts(self, config: CondConvConfig) -> int:
        """E."""
        return config.experts

    def arguments(self, config: CondConvConfig) -> dict[str, Any]:
        """As the base class."""
        return {"experts": config.experts}

    def attention_cost(self, site: Site, config: CondConvConfig) -> tuple[int, int]:
        """A matrix and a bias; of a layer that is not routed by its block."""
        return (site.in_channels + 1) * config.experts, site.in_channels * config.experts

    def layer(self, layer: Any, old: Any, shared: Mapping[str, BlockRouting], plan: ConversionPlan) -> ExpertsConv:
        """As `Operator.layer`."""
        arguments = {
            **self.arguments(plan.config),
            "bias": old.bias is not None,
            "routing": shared[layer.shares[0]] if layer.block else None,
            "device": old.weight.device,
            "dtype": old.weight.dtype,
        }
        if layer.kind == "Linear":
            return CondLinear(old.in_features, old.out_features, **arguments)
        geometry = {name: getattr(old, name) for name in ARGUMENTS}
        new: Any = self.layers[layer.kind]
        return new(old.in_channels, old.out_channels, **geometry, **arguments, pads_same=pads_same(old))

    def apply_(self, net: nn.Module, plan: CondConvPlan, layers: Mapping[str, Any]) -> None:
        """As `Operator.apply_`; blocks whose layers share a routing compute it from their input."""
        blocks = {name: (net.get_submodule(name), planned[0].name) for name, planned in plan.blocks().items()}
        for name, (block, _) in blocks.items():
            check_block(name, block)
        super().apply_(net, plan, layers)
        for block, first in blocks.values():
            route_block_(block, layers[first].routing_fn)

    def translation(self, net: nn.Module, plan: ConversionPlan) -> Translation:
        """timm's names and layout."""
        del plan
        return CondConvTranslation(net)

    def accelerated(self, module: nn.Module) -> DynamicLayer | None:
        """timm's CondConv2d."""
        return accelerated(module)
