"""Checkpoints of a training: written whole or not at all, read without running their pickles."""

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from kernelwarehouse.models import CheckpointError, read_checkpoint

NAME = re.compile(r"checkpoint-(\d+)\.pth")
REQUIRED = {"model", "optimizer", "scaler", "epoch", "step", "best", "temperature", "config"}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` holds, at every moment, either what it held before or all of `state`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is only durable once its folder is
    finally:
        os.close(folder)


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this engine onto the CPU, without running anything in it.

    Raises:
        CheckpointError: No such file, damage anywhere in it, a pickle that is more than data, or no training state.
    """
    path = Path(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch checks no sums of its own
        if damaged:
            raise CheckpointError(f"{path}: damaged: {damaged} has changed since it was written")
    state = read_checkpoint(path)
    missing = sorted(REQUIRED - set(state))
    if missing:
        raise CheckpointError(
            f"{path}: holds no state to continue a training from (no {', '.join(missing)}); --finetune starts from its "
            "weights alone"
        )
    return state


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Find and read the newest numbered checkpoint that is whole; None where there is no checkpoint at all.

    Each damaged one is passed over with a warning.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged: starting anew would write over them.
    """
    paths = _numbered(folder)
    for path in paths:
        if (state := _read_or_warn(path)) is not None:
            return path, state
    if paths:
        raise CheckpointError(
            f"{folder}: none of its {len(paths)} checkpoints can be read; move them away, or pass --auto_resume false "
            "to start anew"
        )
    return None


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Delete all numbered checkpoints in `folder` but the newest `keep`."""
    for path in _numbered(folder)[keep:]:
        path.unlink()


def _numbered(folder: str | Path) -> list[Path]:
    """The checkpoints of single epochs, the newest first."""
    paths = {p: NAME.fullmatch(p.name) for p in Path(folder).glob("checkpoint-*.pth")}
    return sorted((p for p, m in paths.items() if m), key=lambda p: int(paths[p][1]), reverse=True)


def _read_or_warn(path: Path) -> dict[str, Any] | None:
    try:
        return read_state(path)
    except CheckpointError as e:
        warnings.warn(f"passing over a checkpoint: {e}", stacklevel=3)
        return None
