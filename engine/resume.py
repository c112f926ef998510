"""Continuing a training: from which checkpoint, and with which processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..configs.schema import Config, ConfigError, RunConfig
from ..models import CheckpointError
from .checkpoint import newest_checkpoint, read_state
from .distributed import World
from .state import Training


class Found(NamedTuple):
    """A checkpoint to continue from, and what is in it."""

    path: Path
    state: dict[str, Any]


def find_checkpoint(run: RunConfig) -> Found | None:
    """Read the checkpoint that the run names, or else the newest in its folder; None where there is none.

    Raises:
        CheckpointError: It cannot be used.
    """
    if run.resume:
        return Found(Path(run.resume), read_state(run.resume))
    newest = newest_checkpoint(run.output_dir) if run.auto_resume and run.output_dir else None
    return Found(*newest) if newest else None


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
        fitting = [n for n in range(1, total + 1) if total % (n * world.size) == 0]
        nearest = min(fitting, key=lambda n: abs(n - run.batch_size), default=None)
        raise ConfigError(
            f"field 'batch_size': {world.size} process(es) of {run.batch_size} images cannot make the training's total "
            f"batch of {total}; "
            + (f"pass --batch_size {nearest}" if nearest else "take a number of processes that divides it")
        )
    return replace(config, run=replace(run, update_freq=update_freq))


def resume(training: Training, found: Found) -> None:
    """Continue from a checkpoint.

    Raises:
        CheckpointError: It belongs to another model or optimizer.
    """
    try:
        training.load_state_dict(found.state)
    except CheckpointError as e:
        raise CheckpointError(f"{found.path}: {e}") from e


def check_agreement(training: Training, path: Path | None) -> None:
    """Make sure that all processes continue from the same place.

    Raises:
        CheckpointError: They do not, such as on machines without a common `output_dir`.
    """
    places = training.world.gather((str(path), training.step))
    if len(set(places)) > 1:
        found = "; ".join(f"process {rank}: {where}, step {step}" for rank, (where, step) in enumerate(places))
        raise CheckpointError(f"the processes would continue from different checkpoints; share one folder ({found})")
