"""The command line: one option for each field of a configuration."""

import argparse
import json
from collections.abc import Sequence
from typing import Any, get_type_hints

from ..configs.schema import Config, ConfigError, field_help, known_fields, load_config
from ..configs.schema.fields import reject_unknown
from .signals import EXIT_INTERRUPTED

STATUS = (
    "Exit status: 0 when all is done; 1 for a training that diverged or could not save; 2 for what cannot begin; "
    f"{EXIT_INTERRUPTED} for a training that SIGTERM or SIGUSR1 told to end: it has finished its step and saved its "
    "state, and the same command continues it."
)


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line: the fields of `--kw_config`, and over them the options.

    Args:
        arguments: The command line without the program; None takes the process's own.

    Raises:
        ConfigError: An option that is no field (the nearest one is named), or a value that a field refuses.
        SystemExit: After `--help`, or for an option without a value.
    """
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        if unknown[0].startswith("--"):
            name = unknown[0].removeprefix("--").partition("=")[0]
            reject_unknown([name], [*known_fields(), "kw_config"], "command line")
        raise ConfigError(f"command line: unexpected argument {unknown[0]!r}")
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if value is not None}
    # One word is itself: a single ratio holds for all warehouses, a list has one for each.
    given = {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in given.items()}
    return load_config(given.pop("kw_config", {}), given)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser whose values are still strings, or absent: `load_config` knows their types and defaults."""
    parser = argparse.ArgumentParser(description="Train or evaluate a network.", epilog=STATUS, allow_abbrev=False)
    parser.add_argument("--kw_config", metavar="FILE", help="JSON or YAML file whose fields the other options override")
    for owner in sorted(set(known_fields().values()), key=lambda cls: cls.__name__):
        group = parser.add_argument_group(owner.__name__.removesuffix("Config").lower())
        descriptions, hints = field_help(owner), get_type_hints(owner)
        for name in (n for n, cls in known_fields().items() if cls is owner):
            names = ["--local_rank", "--local-rank"] if name == "local_rank" else [f"--{name}"]
            group.add_argument(*names, help=descriptions[name].replace("%", "%%"), **_arity(hints[name]))
    return parser


def _arity(hint: Any) -> dict[str, Any]:
    """How many words a field takes on the command line."""
    if hint is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    if "dict" in str(hint):
        return {"type": json.loads, "metavar": "JSON"}
    if "tuple" in str(hint):
        return {"nargs": "+", "metavar": "VALUE"}
    return {"metavar": "VALUE"}
