"""A toy operator as another package would bring it: convolutions whose outputs are gated, one gate for each sample."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from kernelwarehouse.models import (
    Anneal,
    ConversionPlan,
    DynamicLayer,
    LayerPlan,
    Operator,
    OperatorConfig,
    Report,
    Tied,
    limited,
    register,
)
from kernelwarehouse.models.ops.patterns import check_patterns, matches


@dataclass(frozen=True)
class ToyConfig(OperatorConfig):
    """How a network is gated.

    Attributes:
        hidden_gates: Values that the attention of each layer makes, and that all layers mix by the same weights.
        include: Regular expressions over module names; the convolutions that match one entirely are gated.
    """

    operator: ClassVar[str] = "toy"
    hidden_gates: int = limited(4, low=1)
    include: tuple[str, ...] = (".*",)


class Mixture(Tied):
    """The weights (hidden,) by which all layers mix their hidden gates into one."""

    def __init__(self, hidden, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden, **kwargs))


class ToyLayer(DynamicLayer):
    """y[b] = 2σ(w · attention(mean of x[b]) / τ) · conv(x[b]), with w shared by all layers."""

    def __init__(self, old, mixture):
        super().__init__()
        self.conv, self.mixture = copy.deepcopy(old), mixture
        self.attention = nn.Linear(old.in_channels, len(mixture.weight)).to(old.weight)
        self.conv.reset_parameters()

    def forward(self, x):
        gate = torch.sigmoid(self.attention(x.mean((2, 3))) @ self.mixture.weight / self.temperature.value)
        return 2 * gate[:, None, None, None] * self.conv(x)


@register
class Toy(Operator):
    name, prefix, Config = "toy", "toy", ToyConfig

    def anneal(self, config):
        return Anneal(start=4.0, end=1.0, epochs=1, limits=(0.5, 8.0))

    def plan(self, sites, config):
        check_patterns("include", config.include, [site.name for site in sites])
        chosen = [s for s in sites if s.kind == "Conv2d" and s.role != "stem" and matches(config.include, s.name)]
        hidden = config.hidden_gates
        layers = [
            LayerPlan.of(s, added=hidden * (s.in_channels + 1), macs=hidden * s.in_channels, shares=("mixture",))
            for s in chosen
        ]
        return ConversionPlan(self.name, config, tuple(layers), sites.parameters, shared_parameters=hidden)

    def shared(self, plan, device, dtype):
        return {"mixture": Mixture(plan.config.hidden_gates, device=device, dtype=dtype)}

    def layer(self, layer, old, shared, plan):
        return ToyLayer(old, shared["mixture"])

    @torch.no_grad()
    def load_static(self, layers, olds, plan):
        for name, layer in layers.items():
            layer.conv.load_state_dict(olds[name].state_dict())
            for p in layer.attention.parameters():
                p.zero_()
        return Report()
