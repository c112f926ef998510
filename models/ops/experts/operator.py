"""ExpertsOperator: how a network's convolutions become mixtures of experts, whatever computes the coefficients."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ...plan import ConversionPlan, LayerPlan
from ...sites import Site, Sites
from ...translation import Translation
from ..api import Operator, Report
from ..placement import choose
from .checkpoint import ExpertsTranslation
from .layer import ExpertsConv

ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class ExpertsOperator(Operator):
    """An operator whose layers are `ExpertsConv`.

    Its configuration has the fields `include` and `exclude`.

    Attributes:
        layers: The layers, by the class of torch.nn that they replace.
    """

    layers: ClassVar[Mapping[str, type[ExpertsConv]]]

    @abstractmethod
    def arguments(self, config: Any) -> dict[str, Any]:
        """What its layers are given beside the arguments of a convolution."""

    @abstractmethod
    def num_experts(self, config: Any) -> int:
        """n, the experts of a layer."""

    @abstractmethod
    def attention_cost(self, site: Site, config: Any) -> tuple[int, int]:
        """Parameters of a layer's attention, and its multiply-accumulates for a sample."""

    def placed(self, site: Site) -> bool:
        """Whether the paper replaces a layer of this role."""
        return site.role not in ("stem", "head", "unused", "unknown")

    def plan_layer(self, site: Site, config: Any) -> LayerPlan:
        """The plan of one layer: what its experts and its attention cost."""
        n, kernel = self.num_experts(config), math.prod(site.kernel)
        parameters, macs = self.attention_cost(site, config)
        biases = site.out_channels if site.bias and self.layers[site.kind].mixes_bias else 0
        return LayerPlan.of(site, added=(n - 1) * (kernel + biases) + parameters, macs=n * (kernel + biases) + macs)

    def plan(self, sites: Sites, config: Any) -> ConversionPlan:
        """As `Operator.plan`."""
        kinds = tuple(self.layers)
        chosen, left = choose(sites, config.include, config.exclude, kinds=kinds, placed=self.placed)
        layers = tuple(self.plan_layer(site, config) for site in chosen)
        return ConversionPlan(self.name, config, layers, sites.parameters, left)

    def layer(self, layer: LayerPlan, old: Any, shared: Mapping[str, Any], plan: ConversionPlan) -> ExpertsConv:
        """One layer, initialised as for training from scratch."""
        del shared
        geometry = {name: getattr(old, name) for name in ARGUMENTS}
        new = self.layers[layer.kind](
            old.in_channels,
            old.out_channels,
            **geometry,
            bias=old.bias is not None,
            device=old.weight.device,
            dtype=old.weight.dtype,
            **self.arguments(plan.config),
        )
        new.reset_parameters()
        return new

    def load_static(self, layers: Mapping[str, ExpertsConv], olds: Mapping[str, Any], plan: ConversionPlan) -> Report:
        """Put each static kernel into the middle of its experts, and let the attention rest.

        The network then computes what it did before, for every input and at every temperature.
        """
        del plan
        for name, layer in layers.items():
            layer.load_static_weight(olds[name].weight, olds[name].bias)
        return Report(dict.fromkeys(layers, 0.0))

    def translation(self, net: nn.Module, plan: ConversionPlan) -> Translation:
        """The authors' names."""
        del plan
        return ExpertsTranslation(net)
