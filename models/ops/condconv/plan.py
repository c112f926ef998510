"""Which layers CondConv replaces, and what routes each."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ...plan import ConversionPlan, LayerPlan, shape_text
from ...sites import Site, Sites
from ..placement import choose
from .config import CondConvConfig

ROLES = ("stem", "head", "unused", "unknown")  # of layers that stay static, unless a configuration names them


@dataclass(frozen=True)
class CondConvLayerPlan(LayerPlan):
    """One layer that is replaced.

    Attributes:
        block: The module whose input routes it; empty where its own input does.
        routing_channels: Channels of that input.
        routing_tokens: Whether they are its last dimension.
    """

    block: str = ""
    routing_channels: int = 0
    routing_tokens: bool = False


@dataclass(frozen=True)
class CondConvPlan(ConversionPlan):
    """What a conversion to CondConv does to a network."""

    layers: tuple[CondConvLayerPlan, ...]
    layer_type: ClassVar[type[LayerPlan]] = CondConvLayerPlan

    def blocks(self) -> dict[str, list[CondConvLayerPlan]]:
        """Each block that routes its layers → these."""
        found: dict[str, list[CondConvLayerPlan]] = {}
        for layer in self.layers:
            if layer.block:
                found.setdefault(layer.block, []).append(layer)
        return found

    def tables(self) -> list[list[tuple[str, ...]]]:
        """Layers with the input that routes them."""
        rows = [("layer", "kind", "kernel", "experts", "routed by the input of")]
        rows += [
            (la.name, la.kind, shape_text(la.kernel), str(self.config.experts), la.block or "the layer")
            for la in self.layers
        ]
        return [rows]


def make_plan(sites: Sites, config: CondConvConfig, kinds: tuple[str, ...]) -> CondConvPlan:
    """The plan for a network; see `Operator.plan`."""
    known = tuple(replace(site, foreign=None) if site.pads_same else site for site in sites)
    chosen, left = choose(
        replace(sites, sites=known),
        config.include,
        config.exclude,
        kinds=kinds,
        placed=lambda site: site.role not in ROLES,
    )
    firsts = _first_layers(sites) if config.routing == "block" else {}
    experts, layers, routed = config.experts, [], set()
    for site in chosen:
        block = site.parent if site.parent in firsts else ""
        reader = firsts[block] if block else site
        routing = 0 if block in routed else reader.in_channels * experts  # a block's is counted with its first layer
        if block:
            routed.add(block)
        kernel = math.prod(site.kernel)
        layers.append(
            CondConvLayerPlan.of(
                site,
                added=(experts - 1) * (kernel + site.bias * site.out_channels)
                + (0 if block else (site.in_channels + 1) * experts),
                macs=experts * (kernel + site.bias * site.out_channels) + routing,
                shares=(f"{block}.routing_fn",) if block else (),
                block=block,
                routing_channels=reader.in_channels,
                routing_tokens=reader.kind == "Linear",
            )
        )
    shared = {layer.block: (layer.routing_channels + 1) * experts for layer in layers if layer.block}
    return CondConvPlan(
        config.operator, config, tuple(layers), sites.parameters, left, shared_parameters=sum(shared.values())
    )


def _first_layers(sites: Sites) -> dict[str, Site]:
    """Each block → its first layer, which reads the block's input; by the order of execution where that is known."""
    running = [site for site in sites if site.parent and site.role != "unused"]
    running.sort(key=lambda site: -1 if site.turn is None else site.turn)
    return {site.parent: site for site in reversed(running)}
