"""Continuing a training: from which checkpoint, and with which processes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..configs.schema import Config, ConfigError, RunConfig, field_names
from ..models import CheckpointError, MisfitError
from .checkpoint import newest_checkpoint, numbered, pass_over, position, read_state
from .distributed import World
from .state import Training


class Found(NamedTuple):
    """A checkpoint to continue from, and what is in it."""

    path: Path
    state: dict[str, Any]


def find_checkpoint(run: RunConfig) -> Found | None:
    """Read the checkpoint to continue from, if there is one.

    It is the newest in the run's folder; with `resume` that file, unless the folder's run began from it too, and so is
    this one.

    Raises:
        CheckpointError: It cannot be used.
        ConfigError: The folder holds checkpoints of another training, with which this one's would be confused.
    """
    newest = newest_checkpoint(run.output_dir) if run.auto_resume and run.output_dir else None
    if newest and run.resume in ("", newest[1]["config"].get("resume")):
        return Found(*newest)
    found = Found(Path(run.resume), read_state(run.resume)) if run.resume else None
    _refuse_others(run.output_dir, found)
    return found


def _refuse_others(folder: str, found: Found | None) -> None:
    """Raise a ConfigError for checkpoints in `folder` that are not of the training that goes on from `found`."""
    others = numbered(folder) if folder else []
    remedy = f"leave out {'--resume' if found else '--auto_resume false'} to continue that one"
    if found and others and found.path.parent.samefile(folder):
        epoch, iteration, step = (found.state[key] for key in ("epoch", "iteration", "step"))
        reached = (epoch + 1, step) if iteration else (epoch, math.inf)
        others, remedy = [path for path in others if position(path.name) > reached], "move them away"
    if others:
        names = others[0].name + (f" and {len(others) - 1} more" if len(others) > 1 else "")
        raise ConfigError(
            f"field 'output_dir': {folder} holds checkpoints that do not lead to this training ({names}); pass another "
            f"--output_dir, or {remedy}"
        )


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of a number that is nearest to `wanted`, of two the smaller.

    Those with both themselves and their counterpart above a million are not looked for.
    """
    small = [n for n in range(1, min(math.isqrt(number), 10**6) + 1) if number % n == 0]
    return min(sorted([*small, *(number // n for n in small)]), key=lambda n: abs(n - wanted))


def keep_total_batch(config: Config, state: dict[str, Any], world: World) -> Config:
    """Return `config` with the `update_freq` by which these processes make the total batch of a checkpoint.

    With as many processes as before, what the configuration says holds.

    Raises:
        ConfigError: They cannot make it, or the checkpoint lies within an epoch and the total batch was changed.
    """
    run, before, size = config.run, state["config"], len(state["processes"])
    total = before["batch_size"] * before["update_freq"] * size
    if world.size == size:
        if state["iteration"] and run.batch_size * run.update_freq * size != total:
            raise ConfigError(
                f"field 'batch_size': the checkpoint lies within an epoch of total batch {total}; pass --batch_size "
                f"{before['batch_size']} --update_freq {before['update_freq']}, or change it at the end of an epoch"
            )
        return config
    update_freq, rest = divmod(total, run.batch_size * world.size)
    if rest:
        share, odd = divmod(total, world.size)
        raise ConfigError(
            f"field 'batch_size': {world.size} process(es) of {run.batch_size} images cannot make the training's total "
            f"batch of {total}; "
            + (
                "take a number of processes that divides it"
                if odd
                else f"pass --batch_size {nearest_divisor(share, run.batch_size)}"
            )
        )
    return replace(config, run=replace(run, update_freq=update_freq))


def resume(training: Training, found: Found) -> Found:
    """Continue from a checkpoint, or from an older one if the state in it is bad and the run does not name it.

    A state that does not fit is bad if the same network and optimizer wrote it, and otherwise an error of the user's.

    Returns:
        What the training continues from.

    Raises:
        CheckpointError: It belongs to another model or optimizer, or holds no state to go on from; the training is
            then unchanged.
    """
    run = training.run
    while True:
        try:
            training.load_state_dict(found.state)
            return found
        except CheckpointError as e:
            error = type(e)(f"{found.path}: {e}")
            if run.resume or (isinstance(e, MisfitError) and not _same_network(training.config, found.state["config"])):
                raise error from e
            pass_over(error)
        if (older := newest_checkpoint(run.output_dir, before=found.path)) is None:
            raise error
        found = Found(*older)
        if keep_total_batch(training.config, found.state, training.world) != training.config:
            raise CheckpointError(f"{found.path}: has another total batch than the newest; pass it by --resume")


def _same_network(config: Config, before: Mapping[str, Any]) -> bool:
    """Whether the fields that decide which weights and moments there are say the same."""
    now = config.to_fields()
    names = set(now) - set(field_names(RunConfig)) | {"opt", "freeze", "layer_decay"}
    return all(name in before and before[name] == now[name] for name in names)


def check_agreement(training: Training, path: Path | None) -> None:
    """Make sure that all processes continue from the same place.

    Raises:
        CheckpointError: They do not, such as on machines without a common `output_dir`.
    """
    places = training.world.gather((str(path), training.step))
    if len(set(places)) > 1:
        found = "; ".join(f"process {rank}: {where}, step {step}" for rank, (where, step) in enumerate(places))
        raise CheckpointError(f"the processes would continue from different checkpoints; share one folder ({found})")
