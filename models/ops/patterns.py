"""Choosing layers by regular expressions over their names, as the fields `include` and `exclude` of operators do."""

import re
from collections.abc import Iterable, Mapping


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns is the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def first_match(patterns: Mapping[str, str], name: str) -> str | None:
    """What the first pattern that is the whole name stands for."""
    return next((value for pattern, value in patterns.items() if re.fullmatch(pattern, name)), None)


def check_patterns(field: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise a ValueError for a pattern that is no regular expression or matches none of the names."""
    for pattern in patterns:
        try:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ValueError(
                    f"{field}: {pattern!r} matches no layer; a pattern is a regular expression for the whole name, "
                    f"such as those of {', '.join(names[:3])}"
                )
        except re.error as e:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression: {e}") from e
