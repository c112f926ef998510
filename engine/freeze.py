"""Keeping parts of a network as they are."""

import re
from collections.abc import Iterable

from torch import nn

from ..configs.schema import ConfigError
from ..models import warehouse_users


def freeze_parameters(model: nn.Module, patterns: Iterable[str]) -> None:
    """Exclude parameters from training.

    Cells that several layers share are frozen when a pattern names them, or when all parameters of every layer that
    mixes from them are frozen.

    Args:
        model: Changed in place.
        patterns: Regular expressions; parameters whose whole name one of them matches are frozen.

    Raises:
        ConfigError: No regular expression, one that matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        try:
            named = [name for name in parameters if re.fullmatch(pattern, name)]
        except re.error as e:
            raise ConfigError(f"field 'freeze': {pattern!r} is no regular expression: {e}") from e
        if not named:
            raise ConfigError(f"field 'freeze': {pattern!r} matches no parameter, such as {next(iter(parameters))!r}")
        for name in named:
            parameters[name].requires_grad_(False)
    for cells, users in warehouse_users(model).items():
        of_users = [p for user in users for p in model.get_submodule(user).parameters()]
        if not any(p.requires_grad for p in of_users):
            parameters[cells].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ConfigError("field 'freeze': the patterns freeze every parameter; leave some to train")


def train_mode(model: nn.Module) -> None:
    """Put `model` in training mode, but for norms that are frozen: their running statistics stay as well."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and hasattr(module, "running_mean") and not any(p.requires_grad for p in own):
            module.eval()
