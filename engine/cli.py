"""The command line: one option for each field of a configuration."""

import argparse
import importlib
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn, get_type_hints

from ..configs.schema import Config, ConfigError, Fields, chosen_operator, field_help, field_names, known_fields
from ..configs.schema.fields import read_fields, reject_unknown
from ..models import SCHEMAS, operator_names, read_config
from .signals import EXIT_INTERRUPTED

STATUS = (
    "Exit status: 0 when all is done; 1 for a training that diverged or could not save; 2 for what cannot begin; "
    f"{EXIT_INTERRUPTED} for a training that SIGTERM, SIGUSR1, SIGHUP or SIGINT (Ctrl+C) told to end: it has finished "
    "its step and saved its state, and the same command continues it. A second Ctrl+C ends it at once."
)


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line: the fields of `--kw_config`, and over them the options.

    Args:
        arguments: The command line without the program; None takes the process's own.

    Raises:
        ConfigError: An option that is no field (the nearest one is named), or a value that a field refuses.
        SystemExit: After `--help`, or for an option without a value.
    """
    operator = _operator(arguments)
    options, unknown = build_parser(operator).parse_known_args(arguments)
    if unknown:
        if unknown[0].startswith("--"):
            _explain(unknown[0].removeprefix("--").partition("=")[0], operator)
        raise ConfigError(f"command line: unexpected argument {unknown[0]!r}")
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if value is not None}
    # One word is itself: a single ratio holds for all warehouses, a list has one for each.
    given = {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in given.items()}
    given.pop("import", None)
    return read_config(given.pop("kw_config", {}), given)


def _explain(name: str, operator: type[Fields] | None) -> NoReturn:
    """Say what is wrong with an option that the command line does not have."""
    fields = {} if operator else {other: field_names(SCHEMAS[other]) for other in operator_names()}
    owners = [other for other, names in fields.items() if name in names]
    if owners:
        raise ConfigError(
            f"command line: --{name} is a field of {' or '.join(owners)}: choose that by --operator, or by the model's "
            "prefix"
        )
    reject_unknown([name], [*known_fields(operator), *chain(*fields.values()), "kw_config", "import"], "command line")
    raise ConfigError(f"command line: --{name} cannot be read")


def _operator(arguments: Sequence[str] | None) -> type[Fields] | None:
    """Import what the command line asks for, and find the fields of the operator that it or its file chooses."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("kw_config", "model", "operator"):
        first.add_argument(f"--{name}")
    first.add_argument("--import", action="append", default=[])
    options = vars(first.parse_known_args(arguments)[0])
    for module in options.pop("import"):
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise ConfigError(f"command line: --import {module}: {e}") from e
    file = options.pop("kw_config")
    fields = read_fields(file) if file else {}
    fields |= {name: value for name, value in options.items() if value is not None}
    try:
        name = chosen_operator(fields, SCHEMAS)
        return SCHEMAS[name] if name else None
    except ConfigError as e:
        raise ConfigError(f"{file if file and options['operator'] is None else 'command line'}: {e}") from None


def build_parser(operator: type[Fields] | None = None) -> argparse.ArgumentParser:
    """Return a parser whose values are still strings, or absent: `read_config` knows their types and defaults.

    Args:
        operator: The fields of the operator that was chosen; None for a static network.
    """
    names = ", ".join(operator_names())
    chosen = f"Operators: {names}; the fields of one are shown by --operator NAME --help, or by a model or file of it."
    parser = argparse.ArgumentParser(
        description="Train or evaluate a network.", epilog=f"{STATUS} {chosen}", allow_abbrev=False
    )
    parser.add_argument("--kw_config", metavar="FILE", help="JSON or YAML file whose fields the other options override")
    parser.add_argument(
        "--import", action="append", metavar="MODULE", help="Python module that registers further operators"
    )
    known = known_fields(operator)
    for owner in sorted(set(known.values()), key=lambda cls: cls.__name__):
        group = parser.add_argument_group(owner.__name__.removesuffix("Config").lower())
        descriptions, hints = field_help(owner), get_type_hints(owner)
        for name in (n for n, cls in known.items() if cls is owner):
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
