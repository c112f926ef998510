"""Keeping parts of a network as they are."""

import re
from collections.abc import Iterable

from torch import nn

from ..configs.schema import ConfigError
from ..models import dynamic_layers, shared_labels, sharing


def freeze_parameters(model: nn.Module, patterns: Iterable[str]) -> None:
    """Exclude parameters from training.

    What layers share goes by the plan and not by the place where it is saved: it is frozen when a pattern is the name
    that the plan gives it, such as stage1_layer_conv, or when all else of every layer that uses it is frozen.

    Args:
        model: Changed in place.
        patterns: Regular expressions; parameters whose whole name one of them matches are frozen.

    Raises:
        ConfigError: No regular expression, one that matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    labels = shared_labels(model)
    own = {labels.get(name, name): parameter for name, parameter in parameters.items()}
    for pattern in patterns:
        try:
            named = [name for name in own if re.fullmatch(pattern, name)]
        except re.error as e:
            raise ConfigError(f"field 'freeze': {pattern!r} is no regular expression: {e}") from e
        if not named:
            raise ConfigError(f"field 'freeze': {pattern!r} matches no parameter, such as {next(iter(own))!r}")
        for name in named:
            own[name].requires_grad_(False)
    layers = dynamic_layers(model)
    for shared, users in sharing(model).items():
        of_users = [p for user in users for p in layers[user].parameters() if p is not parameters[shared]]
        if not any(p.requires_grad for p in of_users):
            parameters[shared].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ConfigError("field 'freeze': the patterns freeze every parameter; leave some to train")


def train_mode(model: nn.Module) -> None:
    """Put `model` in training mode, but for norms that are frozen: their running statistics stay as well."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and hasattr(module, "running_mean") and not any(p.requires_grad for p in own):
            module.eval()
