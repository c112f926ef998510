"""Checkpoints of a training: written whole or not at all, read without running their pickles."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..models import CheckpointError, read_checkpoint, seal
from .outputs import SaveError, writing
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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w+b") as file:
            torch.save(state, file)
            seal(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:  # torch's writer turns errors of the file into its own
        raise SaveError(f"{path}: could not be written, and is as it was before: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and keeps names in a journal
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the new name is only durable once its folder is
        finally:
            os.close(folder)


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
    paths = _numbered(folder)
    for path in paths if before is None else [path for path in paths if _age(path) < _age(before)]:
        try:
            return path, read_state(path)
        except CheckpointError as e:
            pass_over(e)
    if paths or before:
        raise CheckpointError(
            f"{folder}: none of its {len(paths)} checkpoints can be used; move them away, or pass --auto_resume false "
            "to start anew"
        )
    return None


def pass_over(error: CheckpointError) -> None:
    """Warn of a checkpoint that is not taken."""
    warnings.warn(f"passing over a checkpoint: {error}", stacklevel=3)


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Delete all numbered checkpoints in `folder` but the newest `keep`, and half-written files of killed runs."""
    for path in (*_numbered(folder)[keep:], *Path(folder).glob("checkpoint-*.pth.tmp")):
        path.unlink()


def _numbered(folder: str | Path) -> list[Path]:
    """The checkpoints of epochs and steps, the newest first."""
    paths = [path for path in Path(folder).glob("checkpoint-*.pth") if NAME.fullmatch(path.name)]
    return sorted(paths, key=_age, reverse=True)


def _age(path: Path) -> tuple[int, float]:
    """Epoch and step by a numbered checkpoint's name; at the end of an epoch the step is the last."""
    match = NAME.fullmatch(path.name)
    return (int(match[1]), float(match[2] or "inf")) if match else (-1, 0.0)
