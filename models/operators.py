"""The operators there are: a name → an operator, imported when it is asked for.

Those of this package stand in the table. Others come from installed packages, by an entry point of the group
``kernelwarehouse.operators``, or from a module that calls `register`, which `--import MODULE` and mmdetection's
`custom_imports` import. A name in a configuration or a checkpoint is looked up here and never imported.
"""

import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ..configs.schema import Config, ConfigError, load_config
from .ops.api import Operator, OperatorConfig

GROUP = "kernelwarehouse.operators"

# Name → prefix of its models' names, and where it is.
_TABLE: dict[str, tuple[str, str]] = {
    "kernel_warehouse": ("kw", ".ops.kernel_warehouse:KernelWarehouse"),
}
_registered: dict[str, Operator] = {}


def register(operator: type[Operator]) -> type[Operator]:
    """Make an operator known by its name; usable as a decorator.

    Raises:
        ValueError: Its name or prefix is taken by another one, or is none.
    """
    if not operator.name.isidentifier() or not re.fullmatch("[a-z]+", operator.prefix):
        raise ValueError(
            f"operator {operator.name!r}, prefix {operator.prefix!r}: names are identifiers, prefixes letters"
        )
    for name in operator_names():
        same = name in _registered and type(_registered[name]).__qualname__ == operator.__qualname__
        if not same and (name == operator.name or prefix_of(name) == operator.prefix):
            raise ValueError(f"operator {operator.name!r} with prefix {operator.prefix!r}: taken by {name!r}")
    _registered[operator.name] = operator()
    return operator


def operator_names() -> list[str]:
    """The names of all operators that can be asked for."""
    return sorted({*_TABLE, *_registered, *_plugins()})


def built_in_operators() -> list[str]:
    """The names of this package's own operators."""
    return list(_TABLE)


def get_operator(name: str) -> Operator:
    """The operator of a name.

    Raises:
        ConfigError: There is none; the message names the nearest and how others are brought in.
    """
    if name in _registered:
        return _registered[name]
    if name in _TABLE:
        module, _, attribute = _TABLE[name][1].partition(":")
        operator = getattr(importlib.import_module(module, __package__), attribute)
    elif name in _plugins():
        operator = _plugins()[name].load()
        if operator.name != name:
            raise ConfigError(f"operator {name!r}: the entry point gives an operator called {operator.name!r}")
    else:
        near = difflib.get_close_matches(name, operator_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(operator_names())}."
        raise ConfigError(
            f"operator {name!r} is not known; {hint} One of another package is brought in by installing it, or by "
            "--import MODULE (custom_imports in mmdetection)"
        )
    _registered[name] = operator()
    return _registered[name]


def prefix_of(name: str) -> str:
    """The prefix of an operator's models."""
    return _TABLE[name][0] if name in _TABLE else get_operator(name).prefix


def split_model_name(model: str) -> tuple[str, str] | None:
    """("kw_resnet34") → (operator's name, "resnet34"); a name with a digit behind the prefix is a preset, kept whole.

    None for a name without an operator's prefix.
    """
    for name in operator_names():
        prefix = prefix_of(name)
        if model.startswith(f"{prefix}_"):
            return name, model.removeprefix(f"{prefix}_")
        if re.match(rf"{prefix}\d", model):
            return name, model
    return None


class _Schemas(Mapping[str, type[OperatorConfig]]):
    """What the reader of configurations is handed: each operator's name → the dataclass of its fields."""

    def __getitem__(self, name: str) -> type[OperatorConfig]:
        return get_operator(name).Config

    def __iter__(self) -> Iterator[str]:
        return iter(operator_names())

    def __len__(self) -> int:
        return len(operator_names())

    def of_model(self, model: str) -> str | None:
        split = split_model_name(model)
        return split[0] if split else None


SCHEMAS = _Schemas()


def read_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """`configs.schema.load_config` with all operators there are."""
    return load_config(source, overrides, operators=SCHEMAS)


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
