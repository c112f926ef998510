"""The operators there are: a name → an operator, imported when it is asked for.

Those of this package stand in the table. Others come from installed packages, by an entry point of the group
``kernelwarehouse.operators``, or from a module that calls `register`, which `--import MODULE` and mmdetection's
`custom_imports` import. A name in a configuration or a checkpoint is looked up here and never imported.
"""

import difflib
import importlib
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import timm

from ..configs.schema import Config, ConfigError, load_config
from .ops.api import Operator, OperatorConfig

GROUP = "kernelwarehouse.operators"

# Name → prefix of its models' names, and where it is.
_TABLE: dict[str, tuple[str, str]] = {
    "kernel_warehouse": ("kw", ".ops.kernel_warehouse:KernelWarehouse"),
    "dyconv": ("dy", ".ops.dyconv:DYConv"),
    "odconv": ("od", ".ops.odconv:ODConv"),
}
_OTHERS = "One of another package is brought in by installing it, or by --import MODULE (custom_imports in mmdetection)"
_registered: dict[str, Operator] = {}


def register(operator: type[Operator]) -> type[Operator]:
    """Make an operator known by its name; usable as a decorator.

    Raises:
        ValueError: Its name or prefix is taken by another one, or is none; or its configuration names another operator.
    """
    if not operator.name.isidentifier() or not re.fullmatch("[a-z]+", operator.prefix):
        raise ValueError(
            f"operator {operator.name!r}, prefix {operator.prefix!r}: names are identifiers, prefixes letters"
        )
    if operator.Config.operator != operator.name:
        raise ValueError(f"operator {operator.name!r}: {operator.Config.__name__} is of {operator.Config.operator!r}")
    known = {name: prefix for name, (prefix, _) in _TABLE.items()} | {name: o.prefix for name, o in _registered.items()}
    for name, prefix in known.items():
        again = name == operator.name and name in _registered and _path(type(_registered[name])) == _path(operator)
        if not again and (name == operator.name or prefix == operator.prefix):
            raise ValueError(f"operator {operator.name!r} with prefix {operator.prefix!r}: taken by {name!r}")
    point = _plugins().get(operator.name)
    if point is not None and _package(point.module) != _package(operator.__module__):
        raise ValueError(f"operator {operator.name!r} of {operator.__module__}: taken by the entry point {point.value}")
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
        ConfigError: There is none, and the message names the nearest and how others are brought in; or the plugin that
            brings it cannot be used.
    """
    if name in _registered:
        return _registered[name]
    if name in _TABLE:
        module, _, attribute = _TABLE[name][1].partition(":")
        _registered[name] = getattr(importlib.import_module(module, __package__), attribute)()
    elif name in _plugins():
        _load(_plugins()[name])
    else:
        near = difflib.get_close_matches(name, operator_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(operator_names())}."
        raise ConfigError(f"operator {name!r} is not known; {hint} {_OTHERS}")
    return _registered[name]


def prefix_of(name: str) -> str:
    """The prefix of an operator's models."""
    return _TABLE[name][0] if name in _TABLE else get_operator(name).prefix


def split_model_name(model: str) -> tuple[str, str] | None:
    """("kw_resnet34") → (operator's name, "resnet34"); a name with a digit behind the prefix is a preset, kept whole.

    None for a name without an operator's prefix, and for one of timm's own, whatever it begins with.

    Raises:
        ConfigError: The name of a network of timm's behind a prefix that no operator has.
    """
    for name in _TABLE:
        if split := _split(model, name):
            return split
    if timm.is_model(model):
        return None
    for name in operator_names():
        try:
            if split := _split(model, name):
                return split
        except ConfigError as e:  # of a plugin, which may have nothing to do with this model
            warnings.warn(str(e), stacklevel=2)
    prefix, _, backbone = model.partition("_")
    if re.fullmatch(r"[a-z]+(\d\w*)?", prefix) and timm.is_model(backbone):
        raise ConfigError(f"model {model!r}: no operator has the prefix of {prefix!r}. {_OTHERS}")
    return None


def _split(model: str, operator: str) -> tuple[str, str] | None:
    prefix = prefix_of(operator)
    if model.startswith(f"{prefix}_"):
        return operator, model.removeprefix(f"{prefix}_")
    return (operator, model) if re.match(rf"{prefix}\d", model) else None


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


def _load(point: EntryPoint) -> None:
    """Register the operator of an installed package."""
    try:
        operator = point.load()
    except Exception as e:  # whatever a module of others raises
        raise ConfigError(f"operator {point.name!r}: its plugin {point.value} cannot be imported: {e}") from e
    if operator.name != point.name:
        raise ConfigError(f"operator {point.name!r}: the entry point gives an operator called {operator.name!r}")
    try:
        register(operator)
    except ValueError as e:
        raise ConfigError(f"plugin {point.value}: {e}") from e


def _path(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _package(module: str) -> str:
    return module.partition(".")[0]
