"""Reading configuration files; and dataclasses whose fields say what they may hold, checked when they are made."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

PACKAGED = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the field, and what would work."""


def find_config(path: str | Path) -> Path:
    """Find a configuration: a file on disk or one that ships with the package.

    Args:
        path: A path, or the name of a shipped file such as ``"resnet18/kw1x_resnet18"`` (a leading ``configs/``
            and the suffix may be left out or kept).

    Raises:
        ConfigError: No such file; the message lists shipped files with similar names.
    """
    path = Path(path)
    if path.is_file():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    if not path.is_absolute():
        packaged = PACKAGED.joinpath(*parts)
        for candidate in (packaged, packaged.with_name(packaged.name + ".json")):
            if candidate.is_file():
                return candidate
    shipped = {p.stem: f"configs/{p.relative_to(PACKAGED).as_posix()}" for p in sorted(PACKAGED.glob("*/*.json"))}
    near = difflib.get_close_matches(path.stem, shipped, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(shipped[n] for n in near)}?" if near else ""
    raise ConfigError(f"{path}: no such configuration file{hint}")


def read_fields(path: str | Path) -> dict[str, Any]:
    """Read the fields of a JSON or YAML file (by suffix).

    Raises:
        ConfigError: No such file, a syntax error (with its line), a repeated field, or no mapping at the top.
    """
    path = find_config(path)
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            fields = yaml.load(text, Loader=_UniqueKeyLoader)
        else:
            fields = json.loads(text, object_pairs_hook=_unique_fields)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}: line {e.lineno}, column {e.colno}: {e.msg}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: {e}") from e
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a mapping of field names to values, found {type(fields).__name__}")
    return fields


def reject_unknown(fields: Iterable[str], known: Iterable[str], source: str) -> None:
    """Raise a `ConfigError` for the first of `fields` that is not in `known`, naming the nearest known one."""
    known = list(known)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ConfigError(f"{source}: unknown field '{name}'; did you mean '{near[0]}'?")


def limited(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    filled: bool = False,
) -> Any:
    """A field of `Fields` whose numbers have limits; so has every number of a tuple. None is always allowed if typed.

    Args:
        default: The field's default.
        low: The least value.
        high: The greatest value.
        above: What every value is greater than.
        below: What every value is less than.
        filled: Whether a tuple needs at least one value.
    """
    limits = {"low": low, "high": high, "above": above, "below": below, "filled": filled}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class Fields:
    """A dataclass whose values are made what its annotations say, and held to the limits of `limited`.

    Annotations may be made of bool, int, float, str, Literal, tuple, dict and ``| None``. Numbers and booleans may be
    written as strings, as a command line or YAML's ``4e-3`` gives them. Numbers are finite.

    Raises:
        ConfigError: A value of the wrong type or out of its limits.
    """

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            found = getattr(self, field.name)
            try:
                value = _coerce(found, hints[field.name])
            except (ValueError, TypeError, OverflowError):
                expected = _describe(hints[field.name])
                raise ConfigError(f"field '{field.name}': expected {expected}, found {found!r}") from None
            if rule := _broken_limit(value, field.metadata):
                raise ConfigError(f"field '{field.name}': must be {rule}, found {found!r}")
            object.__setattr__(self, field.name, value)


F = TypeVar("F", bound=Fields)


def make(cls: type[F], fields: Mapping[str, Any], source: str) -> F:
    """Make the dataclass `cls` from `fields`.

    Args:
        cls: Which.
        fields: Values by field name.
        source: What to name in errors, such as the file's path.

    Raises:
        ConfigError: An unknown field, a missing one, or a value that `cls` refuses.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    reject_unknown(fields, names, source)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in fields:
            raise ConfigError(f"{source}: field '{field.name}' is missing")
    try:
        return cls(**fields)
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


def _broken_limit(value: Any, limits: Mapping[str, Any]) -> str | None:
    """The limits in words, if a value or an item of it is outside of them or not finite."""
    items = list(value) if isinstance(value, tuple) else [value]
    numbers = [v for v in items if isinstance(v, int | float) and not isinstance(v, bool)]
    if limits.get("filled") and value == ():
        return "at least one value"
    tests = {
        "low": (lambda v, limit: v >= limit, "at least {:g}"),
        "above": (lambda v, limit: v > limit, "above {:g}"),
        "high": (lambda v, limit: v <= limit, "at most {:g}"),
        "below": (lambda v, limit: v < limit, "below {:g}"),
    }
    given = {name: limits[name] for name in tests if limits.get(name) is not None}
    if all(math.isfinite(v) and all(tests[name][0](v, limit) for name, limit in given.items()) for v in numbers):
        return None
    if given == {"above": 0}:
        words = "positive"
    elif given == {"low": 0, "high": 1}:
        words = "between 0 and 1"
    else:
        words = " and ".join(tests[name][1].format(limit) for name, limit in given.items())
    words = " and ".join(filter(None, (words, "" if all(map(math.isfinite, numbers)) else "finite")))
    return f"{words} each" if isinstance(value, tuple) else words


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ConfigError(f"field '{name}' is given twice")
        fields[name] = value
    return fields


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which would silently keep the last of several equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        return _unique_fields([(self.construct_object(k, deep), self.construct_object(v, True)) for k, v in node.value])


def _coerce(value: Any, hint: Any) -> Any:
    """Return `value` as the annotation `hint` wants it; ValueError when it is something else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args)
    if origin is typing.Literal:
        if value in args:
            return value
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(item, args[0]) for item in items)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {_coerce(k, args[0]): _coerce(v, args[1]) for k, v in value.items()}
    elif hint is str:
        if isinstance(value, str):
            return value
    elif hint is bool:
        return _coerce_bool(value)
    elif isinstance(value, bool):
        pass
    elif hint is float and isinstance(value, int | float | str):
        return float(value)
    elif (
        hint is int
        and isinstance(value, int | float | str)
        and not (isinstance(value, float) and not value.is_integer())
    ):
        return int(value)
    raise ValueError(value)


def _coerce_union(value: Any, args: tuple[Any, ...]) -> Any:
    if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))):
        return None
    for arg in args:
        if arg is not type(None):
            try:
                return _coerce(value, arg)
            except (ValueError, TypeError):
                continue
    raise ValueError(value)


def _coerce_bool(value: Any) -> bool:
    if isinstance(value, str):
        value = value.lower()
    for words, result in (((True, "true", "yes", "1", 1), True), ((False, "false", "no", "0", 0), False)):
        if value in words:
            return result
    raise ValueError(value)


def _describe(hint: Any) -> str:
    """Put an annotation into words for an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        return f"a list (of {_describe(args[0])})"
    if origin is dict:
        return "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(hint, str(hint))
