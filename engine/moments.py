"""Whether an optimizer can go on from a saved state: compared with what it keeps after a step, and tried."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..configs.schema import RunConfig
from ..models import CheckpointError, MisfitError, cannot_hold
from .optim import make_optimizer

OURS = ("decays", "lr_scale", "weight_decay")  # of a group, which every optimizer takes


def check_moments(optimizer: Optimizer, saved: Mapping[str, Any], run: RunConfig, *, updated: bool) -> None:
    """Check a state against the optimizer that is to go on from it; neither is changed.

    Args:
        optimizer: As `build_optimizer` made it.
        saved: What `optimizer_state_for` returned: it passed the schema.
        run: What the optimizer was made by.
        updated: Whether the optimizer must have taken a step before the state was saved.

    Raises:
        MisfitError: It is that of other groups of parameters.
        CheckpointError: A parameter's entry is not what the optimizer keeps, or it cannot go on from it.
    """
    groups, theirs = optimizer.param_groups, saved["param_groups"]
    sizes, found = ([len(g["params"]) for g in gs] for gs in (groups, theirs))
    if sizes != found:
        raise MisfitError(
            f"it belongs to another optimizer: its groups have {found} parameters, here they have {sizes}"
        )
    for number, (group, their) in enumerate(zip(groups, theirs, strict=True)):
        # The schedule sets the weight decay of groups that decay.
        for name in ("decays", "lr_scale", *(() if group["decays"] else ("weight_decay",))):
            if their[name] != group[name]:
                raise MisfitError(
                    f"it belongs to another optimizer: '{name}' of group {number} is {their[name]}, here {group[name]}"
                )
    kept: dict[tuple[int, torch.Size, torch.dtype], dict[str, Any]] = {}
    absent = 0
    for number, (group, their) in enumerate(zip(groups, theirs, strict=True)):
        for parameter, index in zip(group["params"], their["params"], strict=True):
            kind = number, parameter.shape, parameter.dtype
            entry = saved["state"].get(index, {})
            if kind not in kept:
                kept[kind] = _after_a_step(parameter, group, run)
                if kept[kind]:
                    _try(_twin(parameter, group, run), their, entry, f"parameter {index}")
            absent += bool(kept[kind]) and not entry
            if entry:
                _compare(entry, kept[kind], parameter, f"parameter {index}")
    if absent and updated:
        if absent == sum(sizes):
            raise CheckpointError("'optimizer.state' of its state is empty, and the optimizer has taken steps")
        warnings.warn(
            f"{absent} of {sum(sizes)} parameters have no moments in the checkpoint, and begin afresh", stacklevel=3
        )


def _after_a_step(parameter: nn.Parameter, group: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    """What the optimizer keeps of a parameter after its first step; nothing where it cannot take one by itself."""
    twin = _twin(parameter, group, run)
    try:
        _step(twin)
    except RuntimeError:  # one that needs more than a gradient
        return {}
    return dict(twin.state_dict()["state"].get(0, {}))


def _try(twin: Optimizer, group: Mapping[str, Any], entry: object, name: str) -> None:
    """Take a step from a saved group and a saved entry of one parameter."""
    try:
        # Torch steps in the very tensors that it is given.
        copied = copy.deepcopy({"state": {0: entry} if entry else {}, "param_groups": [{**group, "params": [0]}]})
        twin.load_state_dict(copied)
        _step(twin)
    except Exception as e:  # whatever an optimizer stumbles over
        raise CheckpointError(f"'optimizer' of its state: no step can be taken from it for {name}: {e!r}") from e


def _twin(parameter: nn.Parameter, group: Mapping[str, Any], run: RunConfig) -> Optimizer:
    """The same optimizer over a copy of a parameter, with a gradient."""
    twin = nn.Parameter(parameter.detach().clone())
    twin.grad = torch.full_like(twin, 1e-3)
    return make_optimizer([{"params": [twin], **{name: group[name] for name in OURS}}], run)


def _step(optimizer: Optimizer) -> None:
    """Take a step, and leave the random generators as they are."""
    device = optimizer.param_groups[0]["params"][0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        optimizer.step()


def _compare(entry: Mapping[str, Any], kept: Mapping[str, Any], parameter: Tensor, name: str) -> None:
    for key, wanted in kept.items():
        if key not in entry:
            raise CheckpointError(f"'optimizer.state' of its state has no '{key}' of {name}")
        found = entry[key]
        if key == "step" and float(found) < float(wanted):
            raise CheckpointError(f"'optimizer.state' of its state: {name} has moments, and was updated {found} times")
        if not isinstance(wanted, Tensor):
            continue
        number = wanted.numel() == 1 and isinstance(found, int | float) and not isinstance(found, bool)
        if not number and not (isinstance(found, Tensor) and found.shape == wanted.shape):
            shape = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise CheckpointError(
                f"'optimizer.state' of its state: '{key}' of {name}, of shape {tuple(parameter.shape)}, is {shape}, "
                f"not {tuple(wanted.shape)}"
            )
        if isinstance(found, Tensor) and (problem := cannot_hold(found, wanted.dtype)) is not None:
            raise CheckpointError(f"'optimizer.state' of its state: '{key}' of {name} {problem}")
