"""What an operator is: how it is configured, planned, put into a network, loaded, merged and exported.

An operator is a class that `models/operators.py` knows by its name. Everything outside of `models/ops` works through
these types, and knows no operator by name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...configs.schema import Fields
from ..plan import ConversionPlan
from ..sites import Sites
from ..translation import Translation, original_translation
from .selection import Implementation
from .tied import Temperature, Tied

AUTHORS = "grouped"  # the implementation that is the authors' formulation


class OperatorConfig(Fields):
    """The fields of an operator: a frozen dataclass, whose docstring describes each in a section "Attributes".

    Attributes:
        operator: The operator's name.
    """

    operator: ClassVar[str]


@dataclass(frozen=True)
class Anneal:
    """How the temperature of an operator changes in training.

    Attributes:
        start: Where it starts.
        end: Where it stays afterwards, and in every trained network.
        epochs: How long it takes, linearly in the iterations.
        step: If above 0, it falls by so much at the end of each epoch instead.
        limits: The least and the greatest temperature that the operator can have.
    """

    start: float
    end: float
    epochs: float
    step: float = 0.0
    limits: tuple[float, float] = (0.0, math.inf)

    def value(self, progress: float, epoch: int) -> float:
        """The temperature when a share `progress` of the annealing is done, and so many whole epochs of the run."""
        if self.step:
            return max(self.start - self.step * epoch, self.end)
        return self.end if progress >= 1 else self.end + (self.start - self.end) * (1 - progress)

    def after(self, epochs: float) -> float:
        """The temperature when so many epochs of the run are done."""
        return self.value(epochs / self.epochs if self.epochs else 1.0, int(epochs))

    def within(self, epochs: float) -> "Anneal":
        """The same for a run of so many epochs: it takes at most a third of them."""
        return replace(self, epochs=min(self.epochs, epochs / 3))


@dataclass(frozen=True)
class Preset:
    """A name under which timm gives a converted network.

    Attributes:
        backbone: timm's name of the static network.
        fields: The operator's fields.
        replaced: Entries of timm's default configuration, "first_conv" or "classifier", whose layers are replaced by
            such as have no weight of that name.
    """

    backbone: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a warm start has left.

    Attributes:
        error: By layer, the norm of the difference between the static kernel and the one that the layer has at first,
            over that of the static kernel.
    """

    error: Mapping[str, float] = field(default_factory=dict)


class DynamicLayer(nn.Module):
    """A layer whose kernel depends on its input: all that the engine, detection and scripts rely on.

    A subclass registers what it shares with others as `Tied` modules.

    Attributes:
        plan: The plan by which it was made; None for a layer that was made by hand.
        implementation: "auto", or the name of the implementation that computes it.
        temperature: The τ that it shares with the other layers of its operator in the network; None without one.
    """

    plan: ConversionPlan | None
    implementation: str
    temperature: Temperature | None

    def __init__(self):
        super().__init__()
        self.plan = None
        self.implementation = "auto"
        self.temperature = None
        # torch.fx takes instances of what it believes to be torch.nn for leaves of a trace.
        self.__module__ = "torch.nn"

    def candidates(self) -> Mapping[str, Implementation]:
        """The implementations that `implementation` may name, beside "auto"; none where there is but one."""
        return {}

    def received(self) -> tuple[Tensor, ...]:
        """What its `forward` takes beside its input when it is called by itself, as the network gives it here and now.

        That is for layers which something else in the network tells what to do, such as their block.
        """
        return ()

    def signature(self, x: Tensor) -> Any:
        """What decides how the layer is computed for an input x, here and now: the argument of `select`."""
        del x

    def unsupported(self, implementation: str) -> str | None:
        """Why an implementation cannot compute the layer, whatever the input's size; None if it can."""
        del implementation

    def as_authors(self) -> None:
        """Compute by the formulation of the operator's authors from now on, with the same weights, to compare with.

        It is the implementation "grouped", of all layers that are made of `mixture_conv`. An operator whose parameters
        lie otherwise in memory than its authors' moves them there too.

        Raises:
            ValueError: The layer has no such implementation; nothing is changed.
        """
        if AUTHORS not in self.candidates():
            raise ValueError(f"{type(self).__name__} has no implementation {AUTHORS!r}, the formulation of its authors")
        self.implementation = AUTHORS

    def orders(self, y: Tensor) -> list[tuple[int, int, int]]:
        """The orders in which the layer can be computed, given an output y of one sample, to bound its time from below.

        Returns:
            For each order: multiply-adds of a sample, values read once for a batch, multiply-adds once for a batch.
        """
        del y
        return [(0, sum(p.numel() for p in self.parameters()), 0)]

    def as_images(self, x: Tensor) -> Tensor:
        """The layer's input as its convolution sees it, (B, Cin, *spatial)."""
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, whose compiler knows neither what layers share nor how one is computed."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script; torch.jit.trace gives a ScriptModule for "
            "any batch size, and torch.export and torch.onnx.export work too"
        )

    def shared(self) -> list[Tied]:
        """The modules with parameters that it may share with other layers."""
        children = (child for child in self.children() if isinstance(child, Tied))
        return [child for child in children if next(child.parameters(), None) is not None]

    @property
    def tau(self) -> Tensor:
        """τ, a scalar tensor."""
        temperature = self.temperature
        if temperature is None:
            raise RuntimeError(f"this {type(self).__name__} has no temperature")
        return temperature.value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        arguments = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.temperature is not None and any(key.startswith(prefix) for key in state_dict):
            self.temperature.expect(missing_keys)


class Operator(ABC):
    """A dynamic operator.

    Attributes:
        name: Its name in configurations.
        prefix: Beginning of the names of converted networks: kw for kw_resnet18, and for kw1d2x_… presets.
        Config: The dataclass of its fields.
        Plan: The class of its plans.
        presets: Names that are registered with timm.
        needs_readers: Whether its plans need to know which layers read each one's output.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    Config: ClassVar[type[OperatorConfig]]
    Plan: ClassVar[type[ConversionPlan]] = ConversionPlan
    presets: ClassVar[Mapping[str, Preset]] = {}
    needs_readers: ClassVar[bool] = False

    @abstractmethod
    def plan(self, sites: Sites, config: Any) -> ConversionPlan:
        """Decide which sites are replaced and by what; changes nothing.

        Raises:
            ValueError: The network cannot be converted so; the message names the layer, what was found, and what
                would work.
        """

    @abstractmethod
    def layer(self, layer: Any, old: Any, shared: Mapping[str, Any], plan: Any) -> DynamicLayer:
        """Make one layer, initialised as for training from scratch, in place of `old`."""

    def anneal(self, config: Any) -> Anneal | None:
        """How the temperature changes in training; None for an operator, or a configuration, without one."""
        del config

    def shared(self, plan: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Tied]:
        """Make what layers share, by the names that their plans have in `shared`."""
        del plan, device, dtype
        return {}

    def load_static(self, layers: Mapping[str, Any], olds: Mapping[str, Any], plan: Any) -> Report:
        """Let the layers compute at first what the static ones did.

        Raises:
            ValueError: That is impossible for this operator or plan, before anything is changed.
        """
        del layers, olds, plan
        raise ValueError(f"{self.name} cannot start from a static network's weights; pass keep_weights=False")

    def check_static(self, plan: Any) -> None:
        """Raise a ValueError when `load_static` would, for this plan."""
        del plan
        if type(self).load_static is Operator.load_static:
            raise ValueError(f"{self.name} cannot start from a static network's weights; pass keep_weights=False")

    def apply_(self, net: nn.Module, plan: Any, layers: Mapping[str, DynamicLayer]) -> None:
        """Put the new layers into the network; an operator that rewrites blocks does that here too."""
        del plan
        for name, layer in layers.items():
            net.set_submodule(name, layer)

    def translation(self, net: nn.Module, plan: Any) -> Translation:
        """How the authors' weights, and older ones of ours, are read into a network that was converted by `plan`."""
        del plan
        return original_translation(net)

    def check_merge(self, layers: Mapping[str, Any], **options: Any) -> None:
        """Raise a ValueError when `merge_` would, for these layers and options."""
        del layers, options
        raise ValueError(f"{self.name} has nothing that could be merged: its layers depend on the input throughout")

    def merge_(self, layers: Mapping[str, Any], x_shapes: Mapping[str, Sequence[int]], **options: Any) -> list[str]:
        """Precompute what does not depend on the input in those layers of a trained network that gain by it.

        Args:
            layers: By name; `check_merge` has let them pass.
            x_shapes: By name, the shape of the input as the layer's convolution sees it.
            **options: The operator's.

        Returns:
            The names of the merged layers.
        """
        self.check_merge(layers, **options)
        del x_shapes
        return []

    def accelerated(self, module: nn.Module) -> DynamicLayer | None:
        """A layer of ours for one of another library that computes the same; None for any other module.

        It holds the very parameters of that layer, under the same names.

        Raises:
            ValueError: Such a layer, whose parameters are computed from others.
        """
        del module

    def export_obstacle(self, target: str) -> str | None:
        """Why a network of this operator cannot be exported to a target such as "onnx", or None."""
        del target
