"""Checkpoints of a training: written whole or not at all, read without running their pickles."""

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..models import CheckpointError, read_checkpoint
from .outputs import KEPT, replacing, writing

# checkpoint-EPOCH.pth after an epoch, checkpoint-EPOCH-STEP.pth within one; the step counts from the run's start.
NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")
# The end of a zip archive is the length of its comment, in two bytes, and the comment: here a sum of all before it.
DIGEST = hashlib.sha256().digest_size
NO_COMMENT, SEALED = (length.to_bytes(2, "little") for length in (0, DIGEST))
REQUIRED = {"model", "optimizer", "scaler", "epoch", "iteration", "best", "config", "processes"}


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
        _seal(file)


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this engine onto the CPU, without running anything in it.

    Raises:
        CheckpointError: No such file, damage anywhere in it, a pickle that is more than data, or no training state.
    """
    path = Path(path)
    if path.is_file():
        try:
            _check_seal(path)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
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
    paths = numbered(folder)
    for path in paths:
        if (state := _read_or_warn(path)) is not None:
            return path, state
    if paths:
        raise CheckpointError(
            f"{folder}: none of its {len(paths)} checkpoints can be read; move them away, or pass another "
            "--output_dir to start anew"
        )
    return None


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


def _seal(file: BinaryIO) -> None:
    """Make a sum over a file of torch.save the comment that ends this zip archive."""
    size = file.seek(-len(NO_COMMENT), os.SEEK_END)
    digest = _digest(file, size)
    file.seek(size)
    file.write(SEALED + digest)


def _check_seal(path: Path) -> None:
    """Compare a sealed file with its sum. Torch checks none, and reads some damaged headers as other weights."""
    with path.open("rb") as file:
        size = max(file.seek(0, os.SEEK_END) - len(SEALED) - DIGEST, 0)
        file.seek(size)
        sealed, digest = file.read(len(SEALED)), file.read()
        if sealed == SEALED and digest != _digest(file, size):
            raise CheckpointError(f"{path}: damaged: it has changed since it was written")


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 2**24))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def _read_or_warn(path: Path) -> dict[str, Any] | None:
    try:
        return read_state(path)
    except CheckpointError as e:
        warnings.warn(f"passing over a checkpoint: {e}", stacklevel=3)
        return None
