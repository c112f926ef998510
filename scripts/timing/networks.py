"""The networks that are timed against each other, made from one configuration."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from kernelwarehouse import ConfigError, ModelConfig, build_model, merge_, set_implementation
from kernelwarehouse.models import dynamic_layers, find_preset, read_config

from .clock import HALF

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
UPSTREAM = "upstream"
MERGED = {"merged": None, "merged-bf16": torch.bfloat16}  # and the type of products, None for that of the precision
_NEAR_ZERO, _GAIN = 1e-2, 0.5  # gains below the first become the second


@dataclass(frozen=True, eq=False)
class Contender:
    """One network in one memory layout.

    Attributes:
        name: What the table calls it: static, upstream, ours, one of `MERGED`, or an implementation that is forced.
        config: Its configuration.
        layout: Memory layout of weights and images, a name in `LAYOUTS`.
        implementation: As `set_implementation`; None for the static network. Upstream's is its layers' `as_authors`.
    """

    name: str
    config: ModelConfig
    layout: str = "NCHW"
    implementation: str | None = None

    def build(self, device: torch.device) -> nn.Module:
        """Build the network; contenders of one configuration have the same weights and statistics.

        The latter are those of random images. With those of the start, what a deep network computes fades into
        denormal numbers, which processors handle at very different speeds. Gains that start near zero, as those of the
        last norms and the layer scales of residual branches do, are raised: else no result would depend on what is
        there.

        Raises:
            ValueError: A configuration that cannot be built.
        """
        torch.manual_seed(0)
        net = build_model(self.config)
        for name, p in net.named_parameters():
            if p.ndim == 1 and not name.endswith("bias") and p.abs().max() < _NEAR_ZERO:
                nn.init.constant_(p, _GAIN)
        update_bn([torch.randn(2, self.config.in_chans, self.config.input_size, self.config.input_size)], net)
        net = net.to(device, memory_format=LAYOUTS[self.layout])
        if self.name == UPSTREAM:
            for layer in dynamic_layers(net).values():
                layer.as_authors()
        elif self.implementation:
            set_implementation(net, self.implementation, otherwise="auto")
        return net

    def build_for(self, images: Tensor, precision: str) -> nn.Module:
        """Build the network to run on such images; the merged ones are merged for them."""
        net = self.build(images.device)
        if self.name not in MERGED:
            return net
        return merge_(net.eval(), images, dtype=MERGED[self.name] or HALF.get(precision))

    def images(self, batch: int, device: torch.device) -> Tensor:
        """Random images (batch, in_chans, side, side) in the contender's layout."""
        side = self.config.input_size
        x = torch.randn(batch, self.config.in_chans, side, side, device=device)
        return x.contiguous(memory_format=LAYOUTS[self.layout])


def static_twin(config: ModelConfig) -> ModelConfig:
    """The same backbone, unconverted."""
    return dataclasses.replace(config, model=find_preset(config.model).backbone, operator=None, operator_fields={})


def meta_network(config: ModelConfig) -> nn.Module:
    """The network without memory for its weights.

    Raises:
        ValueError: It cannot be built.
    """
    with torch.device("meta"):
        return build_model(dataclasses.replace(config, pretrained=False))


def compiled(net: nn.Module, mode: str) -> nn.Module:
    """The network by torch.compile, as one graph for images of one size."""
    torch._dynamo.config.recompile_limit = 64  # networks share the code of timm's modules; beyond it there is an error
    return torch.compile(net, mode=mode, fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class Pair:
    """A converted network and its static twin, at one size of images."""

    converted: ModelConfig
    static: ModelConfig

    @classmethod
    def read(
        cls,
        model: str | Path | Mapping[str, Any],
        static: str | Path | None = None,
        budget: float | None = None,
        side: int | None = None,
    ) -> "Pair":
        """Read the configurations.

        Args:
            model: Configuration of the converted network, or its fields.
            static: Of its static twin; None takes the same backbone unconverted.
            budget: `cell_num_ratio` in place of the configuration's.
            side: Of the images, in place of the configuration's.

        Raises:
            ConfigError: No such configuration, or a static one where a converted one is meant, or the reverse.
        """
        size = {} if side is None else {"input_size": side}
        ratio = {} if budget is None else {"cell_num_ratio": budget}
        converted = dataclasses.replace(read_config(model, {**size, **ratio}).model, pretrained=False)
        if converted.operator is None:
            raise ConfigError(
                f"{model}: {converted.model} is a static network; give the configuration of a converted one"
            )
        if static is None:
            twin = static_twin(converted)
        else:
            images = {"in_chans": converted.in_chans, "input_size": converted.input_size, "pretrained": False}
            twin = read_config(static, images).model
            if twin.operator is not None:
                raise ConfigError(
                    f"{static}: {twin.model} is a converted network; give the configuration of a static one"
                )
        return cls(converted, twin)

    @cached_property
    def no_authors(self) -> str | None:
        """Why the converted network cannot be computed by the authors' formulation; None if it can.

        Raises:
            ValueError: A configuration that cannot be built.
        """
        try:
            for layer in dynamic_layers(meta_network(self.converted)).values():
                layer.as_authors()
        except ValueError as e:
            return str(e)

    def contenders(self, implementations: Sequence[str] = ()) -> list[Contender]:
        """The static network, upstream's formulation in its layout if there is one, ours, and what else is asked for.

        Raises:
            ValueError: A configuration that cannot be built.
        """
        upstream = [Contender(UPSTREAM, self.converted, "NCHW", "grouped")]
        ours = {"ours": "auto", **{name: "auto" if name in MERGED else name for name in implementations}}
        return [
            *(Contender("static", self.static, layout) for layout in LAYOUTS),
            *(upstream if self.no_authors is None else []),
            *(Contender(name, self.converted, layout, forced) for name, forced in ours.items() for layout in LAYOUTS),
        ]
