"""What a configuration may say: `load_config` reads a file into a checked `ModelConfig` and `RunConfig`.

An operator's own fields stand beside them in a file. This folder knows no operator: whoever reads a file hands over
what there is (`Operators`), and the fields of the one that the file names are allowed.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .fields import ConfigError, Fields, find_config, limited, make, read_fields, reject_unknown
from .model import ModelConfig
from .run import RunConfig

__all__ = [
    "Config",
    "ConfigError",
    "Fields",
    "ModelConfig",
    "Operators",
    "RunConfig",
    "chosen_operator",
    "field_help",
    "field_names",
    "find_config",
    "known_fields",
    "limited",
    "load_config",
]


class Operators(Protocol):
    """The operators there are: a mapping from each one's name to the dataclass of its fields."""

    def __getitem__(self, name: str) -> type[Fields]:
        """The fields of an operator; a `ConfigError` names what is missing for an unknown one."""
        ...

    def __iter__(self) -> Iterator[str]: ...

    def of_model(self, model: str) -> str | None:
        """The operator that a model's name says by its prefix, None for a static network's name."""
        ...


@dataclass(frozen=True)
class Config:
    """A model and a run, as one file or command line describes them."""

    model: ModelConfig
    run: RunConfig

    def to_fields(self) -> dict[str, Any]:
        """Return the flat fields of a file that says all of this explicitly; `load_config` reads them back."""
        fields = dataclasses.asdict(self.model)
        operator = fields.pop("operator_fields")
        return {**fields, **operator, **dataclasses.asdict(self.run)}


def field_names(cls: type[Fields]) -> list[str]:
    """The names of the fields that a file may hold for a dataclass."""
    return [f.name for f in dataclasses.fields(cls) if f.name != "operator_fields"]


def known_fields(operator: type[Fields] | None = None) -> dict[str, type[Fields]]:
    """Every field that a configuration with an operator, or without one, may hold, and the dataclass it belongs to."""
    owners = (RunConfig, ModelConfig, *([operator] if operator else ()))
    return {name: cls for cls in owners for name in field_names(cls)}


def field_help(cls: type) -> dict[str, str]:
    """The one description of each field, from the Attributes section of its dataclass."""
    section = re.split(r"Attributes:\n", inspect.cleandoc(cls.__doc__ or ""))[1]  # as Python does itself from 3.13 on
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, operators: Operators
) -> Config:
    """Read a configuration.

    Args:
        source: A JSON or YAML file (or the name of a shipped one), or its fields.
        overrides: Fields that win over those of `source`, such as those of a command line.
        operators: What there is.

    Raises:
        ConfigError: An unknown or mistyped field, a value out of range, no such operator or no such file.
    """
    fields = dict(source) if isinstance(source, Mapping) else read_fields(source)
    name = "configuration" if isinstance(source, Mapping) else str(source)
    fields.update(overrides or {})
    try:
        operator = chosen_operator(fields, operators)
        cls = operators[operator] if operator else None
    except ConfigError as e:
        raise ConfigError(f"{name}: {e}") from None
    owners = known_fields(cls)
    if cls is None:
        reject_fields_of_operators(fields, owners, operators, name)
    reject_unknown(fields, owners, name)
    if "model" not in fields:
        raise ConfigError(
            f"{name}: field 'model' is missing; name a network, or read a configuration (--kw_config FILE)"
        )
    parts = {owner: {k: v for k, v in fields.items() if owners[k] is owner} for owner in set(owners.values())}
    given = {}
    if cls is not None:
        checked = make(cls, parts.get(cls, {}), name)
        given = {k: getattr(checked, k) for k in parts.get(cls, {})}
    model = make(ModelConfig, {**parts[ModelConfig], "operator": operator, "operator_fields": given}, name)
    return Config(model, make(RunConfig, parts.get(RunConfig, {}), name))


def chosen_operator(fields: Mapping[str, Any], operators: Operators) -> str | None:
    """The operator that fields ask for by name or by the model's name; None for a static network.

    Raises:
        ConfigError: Two different ones, or an operator that is no text.
    """
    named, model = fields.get("operator"), fields.get("model")
    by_model = operators.of_model(model) if isinstance(model, str) else None
    if named is None or (isinstance(named, str) and named.lower() in ("none", "null", "")):
        return by_model
    if not isinstance(named, str):
        raise ConfigError(f"field 'operator': expected text, found {named!r}")
    if by_model not in (None, named):
        raise ConfigError(f"field 'operator': the model {model!r} is converted by {by_model!r}, found {named!r}")
    return named


def reject_fields_of_operators(
    fields: Mapping[str, Any], known: Mapping[str, type], operators: Operators, source: str
) -> None:
    """Raise a `ConfigError` for the first field of a static network that means something to an operator alone."""
    for field in fields:
        users = [name for name in operators if field not in known and field in field_names(operators[name])]
        if users:
            raise ConfigError(
                f"{source}: {fields.get('model', 'the model')} is a static network, for which {field!r} means "
                f"nothing; it is a field of {' or '.join(users)}: name that by 'operator', or by the model's prefix"
            )
