"""Checkpoints of a training: written whole or not at all, read without running their pickles."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..models import CheckpointError, read_checkpoint, seal
from .outputs import KEPT, replacing, writing
from .validation import check_state

# checkpoint-EPOCH.pth after an epoch, checkpoint-EPOCH-STEP.pth within one; the step counts from the run's start.
NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` holds, at every moment, either what it held before or all of `state`.

    Raises:
        SaveError: It cannot be written, such as on a full disk.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w+b") as file:
        try:
            torch.save(state, file)
        except RuntimeError as e:  # torch's writer turns errors of the file into its own
            raise OSError(*(e.__context__.args if isinstance(e.__context__, OSError) else e.args)) from e
        seal(file)


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this engine onto the CPU, without running anything in it.

    Raises:
        CheckpointError: No such file, damage anywhere in it, a pickle that is more than data, or no training state
            that a training could go on from.
    """
    state = read_checkpoint(path)
    try:
        check_state(state)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    return state


def newest_checkpoint(folder: str | Path, before: Path | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Find and read the newest numbered checkpoint that can be used; None where there is no checkpoint at all.

    Each that is damaged, or holds a bad state, is passed over with a warning.

    Args:
        folder: Where they lie.
        before: One that cannot be used: only older ones are looked at.

    Raises:
        CheckpointError: There are checkpoints, and none can be used: starting anew would write over them.
    """
    paths = numbered(folder)
    for path in paths if before is None else [path for path in paths if position(path.name) < position(before.name)]:
        try:
            return path, read_state(path)
        except CheckpointError as e:
            pass_over(e)
    if paths or before:
        raise CheckpointError(
            f"{folder}: none of its {len(paths)} checkpoints can be used; move them away, or pass another "
            "--output_dir to start anew"
        )
    return None


def pass_over(error: CheckpointError) -> None:
    """Warn of a checkpoint that is not taken."""
    warnings.warn(f"passing over a checkpoint: {error}", stacklevel=3)


def prune_checkpoints(folder: str | Path, keep: int, newest: str) -> None:
    """Delete numbered checkpoints, and half-written files of killed runs.

    What is later than the checkpoint named `newest`, such as damaged files that were passed over, is left, and of all
    others the last `keep`, itself among them. What cannot be deleted is named in a warning.
    """
    last = position(newest)
    old = [path for path in numbered(folder) if position(path.name) <= last][keep:]
    half_written = [path for name in ("checkpoint-*.pth", *KEPT) for path in Path(folder).glob(f"{name}*.tmp")]
    for path in (*old, *half_written):
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            warnings.warn(f"{path}: could not be deleted: {e.strerror or e}", stacklevel=3)


def numbered(folder: str | Path) -> list[Path]:
    """Return the checkpoints of epochs and steps, the newest first."""
    paths = [path for path in Path(folder).glob("checkpoint-*.pth") if NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: position(path.name), reverse=True)


def position(name: str) -> tuple[int, float]:
    """Return epoch and step of a numbered checkpoint; the one after an epoch is later than those within it."""
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name} is no numbered checkpoint")
    return int(match[1]), float(match[2] or "inf")
