"""Which layers CondConv replaces, and what routes each."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...plan import ConversionPlan, LayerPlan, shape_text
from ...sites import Site, Sites
from ..patterns import check_patterns, matches
from .config import CondConvConfig


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


def make_plan(sites: Sites, config: CondConvConfig) -> CondConvPlan:
    """The plan for a network; see `Operator.plan`."""
    chosen, left = _choose(sites, config)
    for site in chosen:
        _check(site)
    blocks = _blocks(sites) if config.routing == "block" else {}
    experts = config.experts
    layers, routed = [], set()
    for site in chosen:
        first = blocks.get(site.parent, site) if site.parent else site
        block = site.parent if site.parent in blocks else ""
        routing = 0 if block in routed else first.in_channels * experts  # a block's is counted with its first layer
        if block:
            routed.add(block)
        kernel = math.prod(site.kernel)
        own = 0 if block else (site.in_channels + 1) * experts
        layers.append(
            CondConvLayerPlan.of(
                site,
                added=(experts - 1) * (kernel + site.bias * site.out_channels) + own,
                macs=experts * kernel + routing,
                shares=(f"{block}.routing_fn",) if block else (),
                block=block,
                routing_channels=first.in_channels,
                routing_tokens=first.kind == "Linear",
            )
        )
    shared = {la.block: (la.routing_channels + 1) * experts for la in layers if la.block}
    return CondConvPlan(
        config.operator, config, tuple(layers), sites.parameters, left, shared_parameters=sum(shared.values())
    )


def _blocks(sites: Iterable[Site]) -> dict[str, Site]:
    """Each block → its first layer, which reads the block's input."""
    first: dict[str, Site] = {}
    for site in sites:
        if site.parent and site.role != "unused":
            known = first.setdefault(site.parent, site)
            if None not in (site.turn, known.turn) and site.turn < known.turn:  # pyright: ignore[reportOptionalOperand]
                first[site.parent] = site
    return first


def _choose(sites: Sites, config: CondConvConfig) -> tuple[list[Site], tuple[tuple[str, str], ...]]:
    names = [site.name for site in sites]
    check_patterns("include", config.include or (), names)
    check_patterns("exclude", config.exclude, names)
    found = [site for site in sites if not matches(config.exclude, site.name)]
    if config.include is not None:
        return [site for site in found if matches(config.include, site.name)], ()
    body = [site for site in found if site.role not in ("stem", "head", "unused")]
    left = tuple((site.name, site.foreign) for site in body if site.foreign and not site.pads_same)
    return [site for site in body if site.name not in dict(left)], left


def _check(site: Site) -> None:
    """Raise a ValueError for a layer that cannot be replaced."""
    if site.obstacle:
        raise ValueError(site.obstacle)
    if site.foreign and not site.pads_same:
        raise ValueError(f"{site.name} cannot be converted: {site.foreign}; exclude it")
    if site.repeats == 0:
        raise ValueError(
            f"{site.name} reads an input whose first dimension is not the batch ({site.input_shape} with the example), "
            "and would mix one kernel for parts of several samples: use batch_first=True in the network, or exclude it"
        )
