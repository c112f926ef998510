"""The plan of a conversion: which layer is replaced by what. Pure data: printable, serialisable.

An operator's plan is a subclass of `ConversionPlan` with layers of a subclass of `LayerPlan`, which add what it
decides.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .sites import Site

P = TypeVar("P", bound="LayerPlan")
VERSION = 1  # of the plans that `to_dict` writes


@dataclass(frozen=True)
class LayerPlan:
    """One layer that is replaced.

    Attributes:
        name: The module's name in the network.
        kind: Class of torch.nn that it is now: Conv1d, Conv2d, Conv3d or Linear.
        in_channels: Channels of its input.
        kernel: (Cout, Cin/groups, *k); (out_features, in_features, …ones) for a linear layer.
        repeats: Samples of this layer for one of the network's: more than 1 where images are cut into windows that
            follow each other in the batch, each of which then has a kernel of its own.
        added: Parameters beyond those of the static layer, of what it does not share.
        macs: Multiply-accumulates for a sample beyond those of the static layer.
        shares: Names of what it shares with other layers.
    """

    name: str
    kind: str
    in_channels: int
    kernel: tuple[int, ...]
    repeats: int = 1
    added: int = 0
    macs: int = 0
    shares: tuple[str, ...] = ()

    @classmethod
    def of(cls: type[P], site: Site, **decided: Any) -> P:
        """The plan of a site, with what an operator has decided."""
        described = {"name": site.name, "kind": site.kind, "in_channels": site.in_channels, "kernel": site.kernel}
        return cls(**{**described, "repeats": site.repeats or 1, **decided})


@dataclass(frozen=True)
class ConversionPlan:
    """What `convert_` will do to a network.

    Attributes:
        operator: The operator's name.
        config: Its configuration.
        layers: The layers in the order of ``network.modules()``.
        parameters_before: Parameters of the static network.
        left: Layers that stay static though layers like them are replaced, with the reason.
        shared_parameters: Parameters of what layers share.
        untraced: Why the network could not be run to see how its layers are used, if so.
    """

    operator: str
    config: Any
    layers: tuple[LayerPlan, ...]
    parameters_before: int
    left: tuple[tuple[str, str], ...] = ()
    shared_parameters: int = 0
    untraced: str | None = None

    layer_type: ClassVar[type[LayerPlan]] = LayerPlan

    @property
    def parameters_after(self) -> int:
        """Parameters of the converted network."""
        return self.parameters_before + sum(layer.added for layer in self.layers) + self.shared_parameters

    @property
    def mixing_macs(self) -> int:
        """Multiply-accumulates for one image beyond those of the static network: of making the kernels."""
        return sum(layer.repeats * layer.macs for layer in self.layers)

    def sharing(self) -> dict[str, list[str]]:
        """Name of what is shared → names of the layers that share it."""
        users: dict[str, list[str]] = {}
        for layer in self.layers:
            for name in layer.shares:
                users.setdefault(name, []).append(layer.name)
        return users

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON or a checkpoint."""
        return {"version": VERSION, **dataclasses.asdict(self, dict_factory=_plain)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ConversionPlan":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: Something else, or a plan of a newer version or of an operator that is not there.
        """
        from .operators import get_operator  # which knows the plans of all operators

        fields = dict(data)
        version = fields.pop("version", None)
        if not isinstance(version, int) or not isinstance(fields.get("operator"), str):
            raise ValueError("this is not a conversion plan: it names no version or no operator")
        if version > VERSION:
            raise ValueError(f"the plan is of version {version}; this version of the package reads up to {VERSION}")
        operator = get_operator(fields["operator"])
        try:
            config = operator.Config(**fields.pop("config"))
            return operator.Plan.restore({**fields, "config": config})
        except (KeyError, TypeError, ValueError, StopIteration) as e:
            raise ValueError(f"this is not a conversion plan: {e!r}") from e

    @classmethod
    def restore(cls, fields: Mapping[str, Any]) -> "ConversionPlan":
        """Make the plan of fields that `to_dict` wrote, with `config` as the configuration itself."""
        layers = tuple(restored(cls.layer_type, layer) for layer in fields["layers"])
        left = tuple((str(name), str(reason)) for name, reason in fields["left"])
        return cls(**{**fields, "layers": layers, "left": left})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConversionPlan":
        return self  # it never changes, and the layers of a copied network still have one plan

    def tables(self) -> list[list[tuple[str, ...]]]:
        """The tables that `print` shows; the first row of each is its head."""
        rows = [("layer", "kind", "kernel", "shares")]
        rows += [(la.name, la.kind, shape_text(la.kernel), " ".join(la.shares) or "–") for la in self.layers]
        return [rows]

    def __str__(self) -> str:
        summary = (
            f"{self.operator}: parameters {self.parameters_before:,} → {self.parameters_after:,}; mixing "
            f"{self.mixing_macs / 1e6:,.1f} M MACs an image"
        )
        notes = [
            f"{layer.name}: {layer.repeats} windows an image, a kernel each"
            for layer in self.layers
            if layer.repeats > 1
        ]
        notes += [f"{name} stays static: {reason}" for name, reason in self.left]
        if self.untraced is not None:
            notes.append(f"how the layers are used was not seen: {self.untraced}")
        return "\n\n".join([*map(table_text, self.tables()), summary, *(["\n".join(notes)] if notes else [])])


def restored(cls: type, data: Mapping[str, Any]) -> Any:
    """A dataclass of plain values, whose lists were tuples."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def shape_text(sizes: tuple[int, ...]) -> str:
    """A shape such as 64×64×3×3."""
    return "×".join(map(str, sizes))


def table_text(rows: list[tuple[str, ...]]) -> str:
    """Rows of text as a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: _plain_value(v) for k, v in items}


def _plain_value(value: Any) -> Any:
    return [_plain_value(v) for v in value] if isinstance(value, tuple) else value
