"""What a configuration may say: `load_config` reads a file into a checked `ModelConfig` and `RunConfig`."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fields import ConfigError, find_config, make, read_fields, reject_unknown
from .model import KW_FIELDS, KWConfig, ModelConfig
from .run import RunConfig

__all__ = [
    "Config",
    "ConfigError",
    "KWConfig",
    "ModelConfig",
    "RunConfig",
    "field_help",
    "find_config",
    "known_fields",
    "load_config",
]


@dataclass(frozen=True)
class Config:
    """A model and a run, as one file or command line describes them."""

    model: ModelConfig
    run: RunConfig

    def to_fields(self) -> dict[str, Any]:
        """Return the flat fields of a file that says all of this explicitly; `load_config` reads them back."""
        fields = dataclasses.asdict(self.model)
        operator = fields.pop("kw")
        return {**fields, **operator, **dataclasses.asdict(self.run)}


def known_fields() -> dict[str, type]:
    """Every field that a configuration may hold, and the dataclass it belongs to."""
    owners = (KWConfig, RunConfig, ModelConfig)
    return {f.name: cls for cls in owners for f in dataclasses.fields(cls) if f.name != "kw"}


def field_help(cls: type) -> dict[str, str]:
    """The one description of each field, from the Attributes section of its dataclass."""
    section = re.split(r"Attributes:\n", inspect.cleandoc(cls.__doc__))[1]  # as Python does itself from 3.13 on
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration.

    Args:
        source: A JSON or YAML file (or the name of a shipped one), or its fields.
        overrides: Fields that win over those of `source`, such as those of a command line.

    Raises:
        ConfigError: An unknown or mistyped field, a value out of range, or no such file.
    """
    fields = dict(source) if isinstance(source, Mapping) else read_fields(source)
    name = "configuration" if isinstance(source, Mapping) else str(source)
    fields.update(overrides or {})
    owners = known_fields()
    reject_unknown(fields, owners, name)
    if "model" not in fields:
        raise ConfigError(
            f"{name}: field 'model' is missing; name a network, or read a configuration (--kw_config FILE)"
        )
    parts = {cls: {k: v for k, v in fields.items() if owners[k] is cls} for cls in (KWConfig, ModelConfig, RunConfig)}
    kw = make(KWConfig, parts[KWConfig], name)
    kw_given = {k: getattr(kw, k) for k in KW_FIELDS if k in parts[KWConfig]}
    model = make(ModelConfig, {**parts[ModelConfig], "kw": kw_given}, name)
    return Config(model, make(RunConfig, parts[RunConfig], name))
