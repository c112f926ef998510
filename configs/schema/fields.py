"""Reading configuration files and turning their fields into checked values."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
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


def make(cls: type[T], fields: Mapping[str, Any], source: str) -> T:
    """Make the dataclass `cls` from `fields`, with every value checked against its annotation.

    Args:
        cls: A dataclass whose annotations are made of bool, int, float, str, Literal, tuple, dict and ``| None``.
        fields: Values by field name. Numbers and booleans may be written as strings, as a command line or YAML's
            ``4e-3`` gives them.
        source: What to name in errors, such as the file's path.

    Raises:
        ConfigError: An unknown field, a value of the wrong type, or one that `cls` itself refuses.
    """
    hints = typing.get_type_hints(cls)
    reject_unknown(fields, [f.name for f in dataclasses.fields(cls)], source)
    values = {}
    for name, value in fields.items():
        try:
            values[name] = _coerce(value, hints[name])
        except ValueError:
            expected = _describe(hints[name])
            raise ConfigError(f"{source}: field '{name}': expected {expected}, found {value!r}") from None
    try:
        return cls(**values)
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


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
    elif hint is float:
        return float(value)
    elif hint is int and not (isinstance(value, float) and not value.is_integer()):
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
